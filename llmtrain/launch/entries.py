"""A status file: the runs of one submission, kept by the one process that works on them and read by all others.

It is whole at any moment, and stands in the sweep's directory. A handle is `STATUS_FILE#NUMBER`; an empty file beside
it asks for an end of that run.
"""

import json
from pathlib import Path
from typing import Any


def parsed(handle: str) -> tuple[Path, int]:
    """The status file and the number that `handle` means."""
    file, _, number = handle.rpartition("#")
    return Path(file), int(number)


def status_of(file: Path) -> dict[str, Any] | None:
    """What the status file says; None where there is none."""
    if not file.exists():
        return None
    status: dict[str, Any] = json.loads(file.read_text())
    return status


def cancelled(file: Path, number: int) -> Path:
    """The file that asks for the end of a run."""
    return file.with_suffix(f".cancel-{number}")
