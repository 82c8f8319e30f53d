"""Files that are whole or not there, their hashes, and what the machine says about them, in words."""

import errno
import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from llmtrain.errors import LLMTrainError, TryAgain, UserError

NO_ROOM = {
    errno.ENOSPC: ("the disk is full", "Free some space"),
    errno.EDQUOT: ("your quota of the disk is used up", "Free some space"),
    errno.EFBIG: ("a file may not become that large", "Raise the limit (`ulimit -f`, or the file system's)"),
}
NOT_ALLOWED = {
    errno.EACCES: ("permission denied", "Change its permissions"),
    errno.EPERM: ("operation not permitted", "Change its owner or permissions"),
    errno.EROFS: ("the file system is read-only", "Make it writable"),
    errno.ENOTDIR: ("a file stands where a directory is needed", "Move it away"),
    errno.EEXIST: ("a file stands where a directory is needed", "Move it away"),
}


def in_words(error: BaseException, place: Path | None = None) -> LLMTrainError | None:
    """What the machine said about a file, and on the next line what to do: TryAgain where it has no room, UserError
    where it does not allow what was asked; None where `error` is something else.

    The file is the one that `error` names, or `place`. Libraries in other languages raise errors of their own classes,
    with the system's number in the message.
    """

    def is_it(number: int) -> bool:
        return error.errno == number if isinstance(error, OSError) else f"(os error {number})" in str(error)

    file = getattr(error, "filename", None) or place or "a file"
    for number, (fact, remedy) in NO_ROOM.items():
        if is_it(number):
            return TryAgain(f"{file}: {fact}\n{remedy} and run the same command again; what is saved stays")
    for number, (fact, remedy) in NOT_ALLOWED.items():
        if is_it(number):
            return UserError(f"{file}: {fact}\n{remedy}, or choose another place (to write to: outputs_dir=DIRECTORY)")
    return None


@contextmanager
def writing(place: Path) -> Iterator[None]:
    """Raise what the machine says while the block writes `place` as `in_words` does: TryAgain or UserError."""
    try:
        yield
    except LLMTrainError:
        raise
    except Exception as error:
        if words := in_words(error, place):
            raise words from error
        raise


def sha256_of(path: Path) -> str:
    """SHA-256 of a file's content, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fsync(path: Path) -> None:
    """Make a file's content, or a directory's entries, survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def whole_directory(target: Path) -> Iterator[Path]:
    """A directory `<target>.writing` to fill; when the block ends well it is fsynced and renamed to `target`.

    A kill at any moment leaves a whole `target` or none (an old one is removed just before the rename), and at most a
    `.writing` that the next writer removes. One writer per target: callers that may race hold a lock. Raises TryAgain
    or UserError where the machine has no room or does not allow it.
    """
    aside = target.with_name(f"{target.name}.writing")
    with writing(target):
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        try:
            yield aside
        except BaseException:
            shutil.rmtree(aside, ignore_errors=True)  # a full disk needs the room
            raise
        for path in (*aside.rglob("*"), aside):
            fsync(path)
        if target.exists():
            shutil.rmtree(target)
        aside.rename(target)
        fsync(target.parent)


def write_whole(path: Path, text: str) -> None:
    """Write a text file so that a kill at any moment leaves the old content or the new.

    Raises TryAgain or UserError where the machine has no room or does not allow it.
    """
    aside = path.with_name(f"{path.name}.writing")
    with writing(path):
        with aside.open("w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        aside.rename(path)
        fsync(path.parent)
