"""What a run leaves for its report, beside metrics.jsonl and the records of `llmtrain.artifacts`."""

from pathlib import Path
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from llmtrain.errors import IntegrityError
from llmtrain.files import write_whole


class Trace(BaseModel):
    """A small JSON file, replaced as a whole. It is shown and nothing else: no run depends on it."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, ser_json_inf_nan="strings")

    def write(self, path: Path) -> None:
        path.parent.mkdir(exist_ok=True)
        write_whole(path, self.model_dump_json(indent=2) + "\n")

    @classmethod
    def read(cls, path: Path) -> Self:
        """Raises IntegrityError where the file is something else."""
        try:
            return cls.model_validate_json(path.read_bytes())
        except ValidationError as error:
            raise IntegrityError(f"{path} does not hold {cls.__name__}: {error}; delete it") from error


class Sample(Trace):
    """A held-out prompt and what the model made of it."""

    prompt: str
    continuation: str


class Samples(Trace):
    """`samples/step-….json`: the same prompts continued by the model as it was after `step` steps."""

    step: int
    tokens: int
    """Trained on so far."""
    samples: tuple[Sample, ...]


class Margins(Trace):
    """`margins.json`: ln p(chosen) - ln p(rejected) of each pair, in nats, as of the last evaluation.

    The reward margin is `beta * (after - before)` where the loss does not define another.
    """

    split: Literal["validation", "test"]
    beta: float
    before: tuple[float, ...]
    """Under the reference."""
    after: tuple[float, ...]
    """Under the tuned model."""
    rewards: tuple[float, ...] | None = None
    """The reward margins after tuning, where the loss defines others (per token, without a reference)."""


class Process(Trace):
    """One process that worked on a run; a run that was interrupted has several."""

    started_at_utc: str
    """ISO 8601, whole seconds."""
    machine: dict[str, str]
    """Hardware and versions, by name."""
    seconds: dict[str, float]
    """Spent in each phase."""
    tokens: int
    """Trained on by this process."""


class Processes(Trace):
    """`processes.json`, oldest first."""

    processes: tuple[Process, ...]
