"""What was submitted: `outputs/sweeps/<sweep id>/sweep.json`, its points, and `jobs.jsonl`, a line for each submission.

A search (launch/search.py) begins its points one by one: they stand in `points.jsonl`.
A single run that is submitted is a sweep of one point. The id is a hash of the runs' ids, so that the same command
typed again finds what it has submitted before.
"""

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from llmtrain.config.base import content_hash
from llmtrain.errors import IntegrityError, UserError
from llmtrain.files import write_whole, writing

SWEEPS = "sweeps"
RECORD, JOBS, POINTS = "sweep.json", "jobs.jsonl", "points.jsonl"
Verdict = Literal["done", "pruned", "failed"]


class Point(BaseModel):
    """One run of a sweep."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    overrides: tuple[str, ...]
    """Those of the command line that make this point."""
    run: str
    """The run's directory, relative to outputs."""
    verdict: Verdict | None = None
    """Of a search, once it has one."""


class Begun(BaseModel):
    """A point of a search: so many runs as it has seeds."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    number: int
    """From 0, in the order of the proposals."""
    overrides: tuple[str, ...]
    """Those of the axes."""
    seeds: tuple[int, ...]
    """`trainer.seed` of each run; empty where there is one, with its own."""
    runs: tuple[str, ...]
    """The runs' directories, relative to outputs; none where it cannot be run."""
    verdict: Verdict | None = None
    value: float | None = None
    """The mean of the metric over its runs."""
    reason: str = ""
    """Why that verdict."""

    @property
    def lines(self) -> list[list[str]]:
        """The overrides of each run."""
        return [[*self.overrides, f"trainer.seed={seed}"] for seed in self.seeds] or [list(self.overrides)]


class Sweep(BaseModel):
    """Runs that were submitted together."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    sweep_id: str
    """8 hex digits of the hash of the runs' directories and of their engine, or of what is searched."""
    engine: str
    """`infra.launch.kind` of all of them."""
    created_at_utc: str
    """ISO 8601, whole seconds."""
    points: tuple[Point, ...]

    @property
    def varied(self) -> list[str]:
        """The keys that differ from point to point, in the command line's order."""
        values: dict[str, set[str]] = {}
        for point in self.points:
            for line in point.overrides:
                key, _, value = line.partition("=")
                values.setdefault(key, set()).add(value)
        everywhere = {key for key, found in values.items() if len(found) > 1}
        return [key for key in values if key in everywhere]


def sweep_of(engine: str, points: list[Point], sweep_id: str | None = None) -> Sweep:
    """The record of `points`, made now; a search, whose points come later, has an id of its own."""
    identity = sweep_id or content_hash([engine, sorted(point.run for point in points)])[:8]
    now = datetime.now(UTC).isoformat(timespec="seconds")
    return Sweep(sweep_id=identity, engine=engine, created_at_utc=now, points=tuple(points))


class SweepDirectory:
    """The files of one sweep."""

    def __init__(self, outputs: Path, sweep_id: str) -> None:
        self.outputs, self.path = outputs, outputs / SWEEPS / sweep_id
        self._handles: dict[str, str] = {}
        self._read = 0

    def write(self, sweep: Sweep) -> None:
        """Keep `sweep`, but for one that is there already."""
        self.path.mkdir(parents=True, exist_ok=True)
        if not (self.path / RECORD).exists():
            write_whole(self.path / RECORD, sweep.model_dump_json(indent=2) + "\n")

    def read(self) -> Sweep:
        """Raises UserError where there is none, IntegrityError where it is damaged."""
        try:
            sweep = Sweep.model_validate_json((self.path / RECORD).read_bytes())
            begun = [
                Point(overrides=tuple(line), run=run, verdict=point.verdict)
                for point in self.begun().values()
                for line, run in zip(point.lines, point.runs, strict=False)
            ]
            return sweep.model_copy(update={"points": (*sweep.points, *begun)})
        except OSError as error:
            known = ", ".join(directory.path.name for directory in all_sweeps(self.outputs)) or "none"
            raise UserError(f"{self.path.name}: no such sweep in {self.outputs} (there: {known})") from error
        except ValueError as error:
            raise IntegrityError(f"{self.path / RECORD} is damaged: {error}; restore it from a copy") from error

    def begun(self) -> dict[int, Begun]:
        """The newest line of each point of a search, by its number."""
        found = {point.number: point for point in map(Begun.model_validate, whole_lines(self.path / POINTS))}
        return dict(sorted(found.items()))

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Submitting, among processes of this machine: the second one waits, and finds what the first has done."""
        self.path.mkdir(parents=True, exist_ok=True)
        with (self.path / "lock").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def submitted(self, run: str, handle: str) -> None:
        """Keep that the engine has taken `run`; on disk when this returns."""
        now = datetime.now(UTC).isoformat(timespec="seconds")
        append_line(self.path / JOBS, json.dumps({"run": run, "handle": handle, "time_utc": now}))

    def handles(self) -> dict[str, str]:
        """The newest handle of each run, by its directory; what was read before is not read again."""
        path = self.path / JOBS
        if path.exists():
            with path.open("rb") as file:
                file.seek(self._read)
                added = file.read()
            whole = added[: added.rfind(b"\n") + 1]  # a line that a crash cut short counts as none
            self._handles |= {line["run"]: line["handle"] for line in map(json.loads, whole.splitlines())}
            self._read += len(whole)
        return dict(self._handles)


def append_line(path: Path, line: str) -> None:
    """Add a line, on disk when this returns; what a crash has left of another one is taken away."""
    with writing(path), path.open("a+b") as file:
        size = file.seek(0, os.SEEK_END)
        if size:
            file.seek(-1, os.SEEK_END)
            if file.read() != b"\n":
                file.seek(0)
                file.truncate(file.read().rfind(b"\n") + 1)
        file.write(line.encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def whole_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a file that grows; one that a crash cut short counts as none."""
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return [json.loads(line) for line in lines]


def all_sweeps(outputs: Path) -> list[SweepDirectory]:
    """Every sweep of an outputs directory, the newest last."""
    found = [SweepDirectory(outputs, path.parent.name) for path in (outputs / SWEEPS).glob(f"*/{RECORD}")]
    return sorted(found, key=lambda directory: (directory.read().created_at_utc, directory.path.name))
