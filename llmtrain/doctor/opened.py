"""A run's directory, finished or not, read without disturbing whoever writes it."""

import time
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from llmtrain.config.frozen import FrozenRun, thaw
from llmtrain.errors import IntegrityError, TryAgain, UserError
from llmtrain.telemetry.metrics import METRICS_FILE
from llmtrain.telemetry.vitals import VITALS_FILE, Vitals, read
from llmtrain.training.origin import SICKNESS_FILE, Sickness
from llmtrain.training.resolve import Inputs, inputs_of


@dataclass(frozen=True)
class OpenedRun:
    """What a run has left so far."""

    directory: Path
    frozen: FrozenRun
    rows: list[Vitals]
    sickness: Sickness | None
    """Why it stopped; None where it never did, or went past that step later."""
    state: str
    """In words."""

    @property
    def outputs(self) -> Path:
        return self.directory.parents[1]

    @property
    def seconds(self) -> float:
        """Of training that the rows tell of, all between the first step and the last."""
        return sum(sum(row.seconds.values()) for row in self.rows)

    @property
    def last_step(self) -> int:
        return self.rows[-1].step if self.rows else 0

    def inputs(self) -> Inputs:
        """What it reads. Raises IntegrityError or UserError where that is gone."""
        return inputs_of(self.frozen, self.outputs)


def open_run(directory: Path) -> OpenedRun:
    """Raises UserError where `directory` is no run or has nothing to look at, TryAgain where it has nothing yet, and
    IntegrityError where a file is damaged."""
    if not directory.is_dir():
        raise UserError(f"{directory}: no such directory; give a run's directory, outputs/NAME/RUN_ID")
    directory = directory.resolve()
    frozen = thaw(directory / "config.json")
    rows = read(directory / VITALS_FILE)
    sickness = None
    if (directory / SICKNESS_FILE).exists():
        sickness = Sickness.read(directory / SICKNESS_FILE)
        if rows and rows[-1].step >= sickness.step:
            sickness = None
    if not rows and sickness is None:
        if (directory / METRICS_FILE).exists() and (directory / METRICS_FILE).stat().st_size:
            raise UserError(
                f"{directory} was trained by an llmtrain that wrote no {VITALS_FILE}: there is nothing to look at"
            )
        every = frozen.config.trainer.log_every_tokens
        raise TryAgain(
            f"{directory} has no step to look at yet: the first row of {VITALS_FILE} comes after "
            f"trainer.log_every_tokens={every:,} tokens; start the run, or ask again later"
        )
    _in_order(directory / VITALS_FILE, rows)
    return OpenedRun(directory, frozen, rows, sickness, _state(directory, rows, sickness))


def _in_order(path: Path, rows: list[Vitals]) -> None:
    for before, row in pairwise(rows):
        if row.first_step != before.step + 1:
            raise IntegrityError(
                f"{path}: the row of step {row.step} begins with step {row.first_step}, after step {before.step}: rows "
                f"are missing or there twice; delete the file: no run depends on it"
            )


def _state(directory: Path, rows: list[Vitals], sickness: Sickness | None) -> str:
    if (directory / "version.json").exists():
        return f"finished, {rows[-1].step:,} steps, {rows[-1].tokens:,} tokens" if rows else "finished"
    if sickness:
        return f"stopped at step {sickness.step:,}"
    age = max(0.0, time.time() - (directory / VITALS_FILE).stat().st_mtime)
    return f"not finished: step {rows[-1].step:,}, {rows[-1].tokens:,} tokens, as of {age:,.0f} s ago"
