"""Directories that are made once, whichever process comes first."""

import fcntl
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

from llmtrain.files import whole_directory

_only_looking = ContextVar("only_looking", default=False)


class NotMade(Exception):
    """A directory is not there, and this is `only_looking`."""


@contextmanager
def only_looking() -> Iterator[None]:
    """In this block `make_once` raises NotMade instead of making anything."""
    token = _only_looking.set(True)
    try:
        yield
    finally:
        _only_looking.reset(token)


def is_only_looking() -> bool:
    """Is this `only_looking`? Then nothing is fetched from a network either."""
    return _only_looking.get()


def make_once(target: Path, make: Callable[[Path], None], say: Callable[[str], None]) -> None:
    """Fill `target` by `make`, unless it exists: whole or not at all, by one process at a time.

    A second process waits for the first and then finds the directory made. What killed processes left half-written
    beside it is removed. Raises TryAgain or UserError as `whole_directory` does.
    """
    if target.exists():
        return
    if is_only_looking():
        raise NotMade(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(target.parent)
    with _locked(target, say):
        if target.exists():
            return
        with whole_directory(target) as aside:
            make(aside)


@contextmanager
def _locked(target: Path, say: Callable[[str], None]) -> Iterator[None]:
    with _lock_file(target).open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"waiting for another process that prepares {target}")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _remove_abandoned(parent: Path) -> None:
    """Remove each `.writing` directory whose lock no living process holds."""
    for aside in parent.glob("*.writing"):
        with _lock_file(aside.with_suffix("")).open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                continue
            shutil.rmtree(aside, ignore_errors=True)


def _lock_file(target: Path) -> Path:
    return target.with_name(f".{target.name}.lock")
