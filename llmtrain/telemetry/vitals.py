"""`vitals.jsonl`: how a run feels, a row with each row of training figures. `llmtrain doctor` reads it.

What the data and the config tell is not written here: which rows a step trained on, how much of them was padding. A
resumed run cuts the file back as it does metrics.jsonl.
"""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from warnings import WarningMessage

from pydantic import BaseModel, ConfigDict, ValidationError

from llmtrain.errors import IntegrityError
from llmtrain.files import fsync, writing

VITALS_FILE = "vitals.jsonl"
"""Its name in a run's directory."""

SYNC_MESSAGE = "called a synchronizing CUDA operation"
"""How torch's warning begins (`torch.cuda.set_sync_debug_mode`)."""


class Vitals(BaseModel):
    """One row: what happened since the row before, or since the process began."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    step: int
    """The last one of the row."""
    tokens: int
    """Trained on when it was done."""
    losses: tuple[float, ...]
    """Of each step, the last one being `step`."""
    grad_norms: tuple[float, ...]
    """Of each step, before clipping."""
    time_utc: str
    """ISO 8601, whole seconds."""
    steps_here: int
    """Those of `losses` that this process did: what is below belongs to them."""
    first_of_process: bool
    seconds: dict[str, float]
    """Spent on what: `data` (waiting for a batch), `forward_backward`, `optimizer`, `evaluation`, `checkpoints` and
    `report` (with samples). A GPU is waited for at the end of the backward pass: its time in the optimizer is counted
    to the next step's `forward_backward`."""
    num_compiled: int
    """Graphs that torch.compile made."""
    compile_seconds: float
    compile_reasons: dict[str, int]
    """Why a graph was compiled again, in torch's words, and how often."""
    host_syncs: dict[str, int]
    """On CUDA, of one step: how often the CPU waited for the GPU, by file:line."""
    peak_memory_bytes: int
    """Largest resident memory of the process; on CUDA, of the tensors on the device."""

    @property
    def first_step(self) -> int:
        """The step of the first loss."""
        return self.step - len(self.losses) + 1


class VitalsFile:
    """The file of one run, written to by one process; it is open only while it is written to."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, row: Vitals) -> None:
        """Add a row; it survives the death of the process, and the machine's after the next `size`."""
        with writing(self.path), self.path.open("ab") as file:
            file.write(row.model_dump_json().encode() + b"\n")

    @property
    def size(self) -> int:
        """Bytes, all of them on disk; 0 where there is no file."""
        if not self.path.exists():
            return 0
        with writing(self.path):
            fsync(self.path)
        return self.path.stat().st_size

    def truncate(self, size: int) -> None:
        """Cut away the rows after the first `size` bytes; what is missing before them is missed by nobody but the
        doctor."""
        if self.size > size:
            with writing(self.path):
                os.truncate(self.path, size)
                fsync(self.path)


def read(path: Path) -> list[Vitals]:
    """The rows of a file, none where there is no file. A last line without its end is not a row yet.

    Raises IntegrityError for a line that is no row.
    """
    if not path.exists():
        return []
    rows = []
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], start=1):
        try:
            rows.append(Vitals.model_validate_json(line))
        except ValidationError as error:
            reason = error.errors()[0]["msg"]
            raise IntegrityError(
                f"{path}:{number}: not a row of vitals ({reason}); delete the file: no run depends on it"
            ) from error
    return rows


def without_times(row: Vitals) -> dict[str, Any]:
    """What two runs with equal mathematics have in common."""
    return row.model_dump(include={"step", "tokens", "losses", "grad_norms"})


def count_syncs(warned: Iterable[WarningMessage]) -> tuple[dict[str, int], list[WarningMessage]]:
    """(how many of the warnings tell of a wait for the GPU, by `file:line`; the warnings that tell of something else).

    `file` is the last three parts of the path.
    """
    syncs: dict[str, int] = {}
    others = []
    for warning in warned:
        if str(warning.message).startswith(SYNC_MESSAGE):
            place = f"{'/'.join(Path(warning.filename).parts[-3:])}:{warning.lineno}"
            syncs[place] = syncs.get(place, 0) + 1
        else:
            others.append(warning)
    return dict(sorted(syncs.items(), key=lambda entry: -entry[1])), others
