"""How a submitted run stands: what its engine says, and what its directory says. Imports nothing that trains."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from llmtrain.launch.engine import Job, State, Tells, engine_of, run_in
from llmtrain.launch.figures import last_rows
from llmtrain.launch.starts import starts
from llmtrain.launch.sweeps import POINTS, Point, SweepDirectory

ENDED = ("finished", "pruned", "failed", "stopped", "lost")


@dataclass(frozen=True)
class Status:
    """A run of a sweep."""

    point: Point
    directory: Path
    handle: str
    state: str
    """finished, running, waiting, stopping; pruned (its search has given it up); failed (the job has ended, the run has
    not); stopped (by a person); lost (the engine has no memory of the job)."""
    job: Job
    node: str
    starts: int
    step: int
    tokens: int
    total_tokens: int | None
    """None until the run has begun."""
    loss: float | None
    """The newest validation loss; before the first, the training loss."""
    tokens_per_second: float | None

    @property
    def eta(self) -> timedelta | None:
        """Of the steps that are left; evaluations and waiting come on top."""
        if self.state != "running" or not self.tokens_per_second or self.total_tokens is None:
            return None
        return timedelta(seconds=round((self.total_tokens - self.tokens) / self.tokens_per_second))


def statuses(place: SweepDirectory) -> list[Status]:
    """Each run of a sweep, in the order of its points. Raises UserError where there is no such sweep."""
    sweep, handles = place.read(), place.handles()
    if not sweep.points:
        return []  # a search that has just begun
    first = run_in(place.outputs / sweep.points[0].run)
    jobs = engine_of(first.infra.launch).jobs(list(handles.values()))
    if (place.path / POINTS).exists():  # whoever begins points submits them next
        jobs[""] = Job(State.WAITING, reason="is being submitted")
    return [_status(place.outputs, point, handles.get(point.run, ""), jobs) for point in sweep.points]


def cancel(place: SweepDirectory, chosen: Sequence[Status]) -> None:
    """End the jobs of `chosen` runs, as their engine does it."""
    alive = [status.handle for status in chosen if status.state not in ENDED]
    if alive:
        engine_of(run_in(chosen[0].directory).infra.launch).cancel(alive)


def engines_log(status: Status) -> str:
    """What the engine keeps of what the run's job has printed; empty where it keeps nothing."""
    if not status.handle:
        return ""
    engine = engine_of(run_in(status.directory).infra.launch)
    return engine.log(status.handle) if isinstance(engine, Tells) else ""


def _status(outputs: Path, point: Point, handle: str, jobs: dict[str, Job]) -> Status:
    directory = outputs / point.run
    job, rows, begun = jobs.get(handle, Job(State.UNKNOWN)), last_rows(directory), starts(directory)
    clock = directory / "clock.json"
    newest: dict[str, Any] = {}
    for row in rows:
        newest |= row
    loss = newest.get("validation/loss", newest.get("train/loss"))
    return Status(
        point=point,
        directory=directory,
        handle=handle,
        state=_state(directory, job, point),
        job=job,
        node=job.node or (begun[-1].node if begun else ""),
        starts=len(begun),
        step=newest.get("step", 0),
        tokens=newest.get("tokens", 0),
        total_tokens=json.loads(clock.read_text())["tokens"] if clock.exists() else None,
        loss=loss if isinstance(loss, float) else None,
        tokens_per_second=newest.get("train/tokens_per_second"),
    )


def _state(directory: Path, job: Job, point: Point) -> str:
    if (directory / "version.json").exists():
        return "finished"
    match job.state:
        case State.ENDED | State.UNKNOWN if point.verdict == "pruned":
            return "pruned"
        case State.ENDED:
            return "stopped" if "cancelled" in job.reason else "failed"
        case State.UNKNOWN:
            return "lost"
        case _:
            return str(job.state.value)
