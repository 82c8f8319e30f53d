"""`starts.jsonl` of a run that an engine started: a line each time its processes begin.

It says where the run is, and whether it gets on: a run that is started again and again without a new checkpoint has
something that another start does not mend.
"""

import json
import os
import socket
from datetime import UTC, datetime
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from llmtrain.files import writing

STARTS = "starts.jsonl"
LOG = "log.txt"
"""What the processes of all starts printed, in a run's directory."""


class Start(BaseModel):
    """One start of a run's processes."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    time_utc: str
    """ISO 8601, whole seconds."""
    engine: str
    job: str
    """The engine's name for it."""
    node: str
    """Host name of rank 0's machine."""
    pid: int
    step: int
    """The newest checkpoint's, from which it goes on; 0 where there is none."""


def note(directory: Path, engine: str, job: str) -> Start:
    """Add a line about this process, rank 0 of the run in `directory`."""
    start = Start(
        time_utc=datetime.now(UTC).isoformat(timespec="seconds"),
        engine=engine,
        job=job,
        node=socket.gethostname(),
        pid=os.getpid(),
        step=newest_step(directory),
    )
    path = directory / STARTS
    with writing(path), path.open("a") as file:
        file.write(start.model_dump_json() + "\n")
    return start


def starts(directory: Path) -> list[Start]:
    """All starts, oldest first; none where no engine has started the run. A line cut short by a crash is left out."""
    path = directory / STARTS
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return [Start.model_validate(json.loads(line)) for line in lines]


def in_vain(directory: Path) -> int:
    """How many of the last starts began at the newest checkpoint of now: they have not got beyond it."""
    now, count = newest_step(directory), 0
    for start in reversed(starts(directory)):
        if start.step != now:
            break
        count += 1
    return count


def newest_step(directory: Path) -> int:
    """The step of the newest checkpoint, by its name; whether it is whole is found when it is loaded."""
    names = [path.name.removeprefix("step-") for path in (directory / "checkpoints").glob("step-*")]
    return max((int(name) for name in names if name.isdigit()), default=0)
