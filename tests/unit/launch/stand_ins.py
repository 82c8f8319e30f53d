"""A search without training: an engine that keeps its jobs in files and lets runs go on by the clock or by the look."""

import json
import math
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from llmtrain.config.axes import Space
from llmtrain.config.compose import load_search
from llmtrain.config.frozen import FrozenRun, Resolved
from llmtrain.launch import controller, freezer
from llmtrain.launch.engine import Job, Run, State
from llmtrain.launch.search import SearchDirectory, Searched
from llmtrain.launch.sweeps import SweepDirectory, sweep_of

RESOLVED = Resolved(**dict.fromkeys(Resolved.model_fields, "x"))
LR = "trainer.lr=tag(log,interval(1e-4,1e-2))"
ROWS, TOKENS = 8, 1000
"""Rows of a run, and the tokens between two of them."""


def loss(lr: float, row: int) -> float:
    """Of a run after so many rows: the best learning rate is 1e-3."""
    return 2 + abs(math.log10(lr) + 3) + 1 / row


class FileEngine:
    """Its jobs are files, so that it outlives who submits; a run gets on by a row every `row_s`, or at each look."""

    def __init__(self, place: Path, row_s: float | None = None) -> None:
        self.place, self.row_s = place, row_s
        place.mkdir(parents=True, exist_ok=True)

    def submit(self, sweep: Path, runs: Sequence[Run]) -> Iterator[tuple[Run, str]]:
        for run in runs:
            file = self.place / f"{run.directory.name}-{time.monotonic_ns()}.json"
            aside = file.with_suffix(".writing")
            aside.write_text(json.dumps({"directory": str(run.directory), "since": time.monotonic()}))
            aside.rename(file)
            yield run, str(file)

    def find(self, sweep: Path, runs: Sequence[Run]) -> dict[Path, str]:
        wanted = {str(run.directory): run.directory for run in runs}
        found = {}
        for file in self.place.glob("*.json"):
            directory = json.loads(file.read_text())["directory"]
            if directory in wanted and self._job(str(file)).state is State.RUNNING:
                found[wanted[directory]] = str(file)
        return found

    def script(self, sweep: Path, runs: Sequence[Run]) -> str:
        return "".join(f"run {run.directory}" for run in runs)

    def jobs(self, handles: Sequence[str]) -> dict[str, Job]:
        return {handle: self._job(handle) for handle in handles}

    def cancel(self, handles: Sequence[str]) -> None:
        for handle in handles:
            Path(handle).with_suffix(".cancelled").touch()

    def _job(self, handle: str) -> Job:
        file = Path(handle)
        if not file.exists():
            return Job(State.UNKNOWN)
        if file.with_suffix(".cancelled").exists():
            return Job(State.ENDED, reason="cancelled")
        job = json.loads(file.read_text())
        directory = Path(job["directory"])
        trainer = json.loads((directory / "config.json").read_text())["config"]["trainer"]
        if trainer["seed"] == 666:
            return Job(State.ENDED, reason="exit code 3", code=3)
        metrics = directory / "metrics.jsonl"
        done = metrics.read_text().count("\n") if metrics.exists() else 0
        rows = min(ROWS, done + 1 if self.row_s is None else int((time.monotonic() - job["since"]) / self.row_s))
        (directory / "clock.json").write_text(json.dumps({"steps": ROWS, "tokens": ROWS * TOKENS}))
        lines = [
            {"step": row, "tokens": row * TOKENS, "seconds": 36.0 * row,
             "validation/loss": loss(trainer["lr"], row) + 0.01 * trainer["seed"]}
            for row in range(1, rows + 1)
        ]  # fmt: skip
        metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
        if rows == ROWS:
            (directory / "version.json").write_text("{}")
            return Job(State.ENDED, reason="exit code 0", code=0)
        return Job(State.RUNNING)

    def submitted(self) -> list[str]:
        """The run of each submission."""
        return sorted(json.loads(file.read_text())["directory"] for file in self.place.glob("*.json"))


class QuickFreezer(freezer.Freezer):
    """Freezes without composing: only the learning rate and the seed differ."""

    def __init__(self, searched: Searched) -> None:
        self.searched = searched

    def __call__(self, overrides: list[str]) -> Path:
        values = dict(line.partition("=")[::2] for line in overrides)
        found = {"lr": float(values["trainer.lr"]), "seed": int(values.get("trainer.seed", 0))}
        config = self.searched.config
        config = config.model_copy(update={"trainer": config.trainer.model_copy(update=found)})
        frozen = FrozenRun(config=config, resolved=RESOLVED, attempt=1)
        directory = Path(config.outputs_dir, config.name, frozen.run_id)
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "config.json").write_text(frozen.model_dump_json())
        return directory

    def rest(self) -> None:
        pass


def search(outputs: Path, *overrides: str) -> SearchDirectory:
    """The directory of a search that has not begun."""
    outputs.mkdir(parents=True, exist_ok=True)
    found = load_search([f"outputs_dir={outputs}", "experiment=smoke", LR, *overrides])
    assert found is not None
    space, points = found
    return written(outputs, space, Searched(space=space, config=points[0][1], config_dirs=(), config_name="train",
                                            force=False, directory=str(outputs)))  # fmt: skip


def written(outputs: Path, space: Space, searched: Searched) -> SearchDirectory:
    place = SearchDirectory(SweepDirectory(outputs, searched.sweep_id))
    place.place.write(sweep_of("local", [], sweep_id=searched.sweep_id))
    place.write(searched)
    return place


def work(path: str, row_s: float, dies_at: int | None = None) -> None:
    """A controller in a process of its own; it may die at one of its writes to disk."""
    directory = Path(path)
    controller.engine_of = lambda launch: FileEngine(directory / "engine", row_s)  # type: ignore[assignment]
    controller.Freezer = QuickFreezer  # type: ignore[misc]
    if dies_at is not None:
        os.fsync = dying(os.fsync, dies_at)
    place = SearchDirectory(SweepDirectory(directory.parents[1], directory.name))
    with place.only_controller():
        controller.Controller(place, poll_s=0.01).run()


def dying(write: Callable[[int], None], at: int) -> Callable[[int], None]:
    """`write`, after whose call number `at` the process is killed."""
    calls = 0

    def counted(descriptor: int) -> None:
        nonlocal calls
        write(descriptor)
        calls += 1
        if calls == at:
            os.kill(os.getpid(), signal.SIGKILL)

    return counted
