"""Files that are whole or not there, and their hashes."""

import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


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
    `.writing` that the next writer removes. One writer per target: callers that may race hold a lock.
    """
    aside = target.with_name(f"{target.name}.writing")
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
    """Write a text file so that a kill at any moment leaves the old content or the new."""
    aside = path.with_name(f"{path.name}.writing")
    with aside.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    aside.rename(path)
    fsync(path.parent)
