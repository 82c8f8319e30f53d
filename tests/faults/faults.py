"""Faults that befall a training command, in a fork of the server, before a call that is counted."""

import importlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import wraps
from pathlib import Path
from typing import Any

BALLAST = "ballast"
"""The file that fills a disk."""


@dataclass(frozen=True)
class Before:
    """Before the `call`-th call of `function` (`module:name.name`), `act(*arguments)` is done."""

    function: str
    call: int
    act: Callable[..., Any]
    arguments: tuple[Any, ...] = ()

    def install(self) -> None:
        module, _, path = self.function.partition(":")
        *parents, name = path.split(".")
        owner = importlib.import_module(module)
        for parent in parents:
            owner = getattr(owner, parent)
        function = getattr(owner, name)
        num_calls = 0

        @wraps(function)
        def counted(*arguments: Any, **named: Any) -> Any:
            nonlocal num_calls
            num_calls += 1
            if num_calls == self.call:
                self.act(*self.arguments)
            return function(*arguments, **named)

        setattr(owner, name, counted)


def command(words: tuple[str, ...], *faults: Before) -> int:
    """`llmtrain WORDS`, befallen by `faults`."""
    from llmtrain.cli.main import main

    for fault in faults:
        fault.install()
    return main(list(words))


def impatient_command(words: tuple[str, ...], *faults: Before) -> int:
    """The same; MLflow waits half a second for its database, instead of twenty."""
    from mlflow.store.db import utils

    text = utils.sql.text
    utils.sql.text = lambda statement: text(statement.replace("busy_timeout = 20000", "busy_timeout = 500"))
    return command(words, *faults)


def command_with_clocks(words: tuple[str, ...], *faults: Before) -> int:
    """The same, with clocks that `jump` sets."""
    for name, unit in (("time", 1), ("monotonic", 1), ("perf_counter", 1), ("time_ns", 10**9), ("monotonic_ns", 10**9)):
        setattr(time, name, _jumping(getattr(time, name), unit))
    for module in [module for name, module in sys.modules.items() if name.startswith("llmtrain")]:
        if getattr(module, "datetime", None) is datetime:
            module.datetime = JumpingDatetime
    return command(words, *faults)


seconds_ahead = 0


def jump(seconds: int) -> None:
    """Set all clocks of this process forward, or back."""
    global seconds_ahead
    seconds_ahead += seconds


def _jumping(clock: Callable[[], Any], unit: int) -> Callable[[], Any]:
    return lambda: clock() + seconds_ahead * unit


class JumpingDatetime(datetime):
    """`datetime` as llmtrain's modules have it."""

    @classmethod
    def now(cls, tz: Any = None) -> datetime:
        return datetime.now(tz) + timedelta(seconds=seconds_ahead)


def die() -> None:
    """As by `kill -9`."""
    os.kill(os.getpid(), signal.SIGKILL)


def fill(disk: Path, room: int = 0) -> None:
    """Write a file until the disk of the directory is full, but for `room` bytes."""
    with (disk / BALLAST).open("ab", buffering=0) as ballast:
        for size in (2**20, 4096, 1):
            try:
                while ballast.write(b"0" * size) == size:
                    pass
            except OSError:
                continue
        ballast.truncate(ballast.tell() - room)


def empty(disk: Path) -> None:
    """Take away what `fill` wrote."""
    (disk / BALLAST).unlink()


def limit_files(num_bytes: int) -> int:
    """As `ulimit -f`: no file may grow beyond so many bytes."""
    import resource

    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, resource.RLIM_INFINITY))
    return 0


def wait_for(path: Path, announce: bool = True) -> None:
    """Wait until `path` exists; `<path>.waiting` announces it."""
    if announce:
        path.with_name(f"{path.name}.waiting").touch()
    while not path.exists():
        time.sleep(0.01)


LOCK = """
import sqlite3, sys, time
from pathlib import Path
connection = sqlite3.connect(sys.argv[1], timeout=60, isolation_level=None)
connection.execute("BEGIN EXCLUSIVE")
print("locked", flush=True)
end = time.monotonic() + float(sys.argv[3])
while time.monotonic() < end and not Path(sys.argv[2]).exists():
    time.sleep(0.01)
Path(sys.argv[2]).touch()
"""


def lock(database: Path, released: Path, seconds: float) -> None:
    """Let another process lock an SQLite database for `seconds`, or until `released` exists, which says that it did."""
    arguments = [sys.executable, "-c", LOCK, str(database), str(released), str(seconds)]
    process = subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True, start_new_session=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "locked\n"
