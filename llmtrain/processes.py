"""What every process that starts another one, or is stopped by one, agrees on."""

import os
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2)
"""What asks a run to save and to stop. SIGUSR2 is how schedulers say that time is nearly up."""


@contextmanager
def importable() -> Iterator[None]:
    """Let processes that are started in the block find this llmtrain where it is a checkout and not installed."""
    root, before = str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(dict.fromkeys(filter(None, (root, *(before or "").split(os.pathsep)))))
    try:
        yield
    finally:
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before


def started(pid: int) -> str | None:
    """When the process began, in clock ticks since boot: with its pid, a name that does not come again. None where
    there is none, or one that has ended and nobody has asked how. Linux only."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] == "Z" else fields[19]


def lives(process: Sequence[Any] | None) -> bool:
    """Whether the process of that pid and start goes on."""
    return process is not None and started(process[0]) == process[1]
