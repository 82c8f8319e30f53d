"""What launching costs at 10,000 points: python bench/launch_scale.py [--points N] [--grid N] [--json FILE]

A cluster of 64 nodes with 8 GPUs each is simulated with a clock of its own: a run takes a node, lasts 30 to 90 minutes,
and logs a row a minute; the search's controller looks every ten seconds of that clock. Everything else is real: the
controller, Optuna's journal, the sweep's files, the run directories. Freezing is measured apart, on real configs; what
the simulated cluster itself computes is subtracted.
Aims: the controller stays under 1 GB, and under 50 ms of CPU a job.
"""

import argparse
import contextlib
import io
import json
import random
import resource
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from llmtrain.config.compose import load_search, load_sweep
from llmtrain.config.frozen import FrozenRun, Resolved
from llmtrain.launch import controller, slurm, status
from llmtrain.launch.engine import Job, Run, State
from llmtrain.launch.freezer import Freezer
from llmtrain.launch.search import SearchDirectory, Searched
from llmtrain.launch.sweeps import Point, SweepDirectory, sweep_of

NODES, POLL_S, MINUTE = 64, controller.POLL_CLUSTER_S, 60.0
RESOLVED = Resolved(**dict.fromkeys(Resolved.model_fields, "0"))
LINE = ["experiment=smoke", "infra=slurm_cpu", "tracking=none"]


class Cluster:
    """64 places, first come first served, on a clock that goes on by ten seconds at each look."""

    def __init__(self) -> None:
        self.now, self.begun, self.ends, self.lr = 0.0, dict[str, float](), dict[str, float](), dict[str, float]()
        self.rows: dict[str, int] = {}
        self.waiting: list[str] = []
        self.running: set[str] = set()
        self.looked_at, self.cpu = 0, 0.0

    def submit(self, sweep: Path, runs: Sequence[Run]) -> Iterator[tuple[Run, str]]:
        for run in runs:
            handle = str(run.directory)
            self.waiting.append(handle)
            yield run, handle

    def script(self, sweep: Path, runs: Sequence[Run]) -> str:
        return ""

    def jobs(self, handles: Sequence[str]) -> dict[str, Job]:
        cpu = time.process_time()
        self.now += POLL_S
        for handle in list(self.running):
            self._trains(handle)
        while self.waiting and len(self.running) < NODES:
            self._begins(self.waiting.pop(0))
        self.looked_at += len(handles)
        found = {handle: self._job(handle) for handle in handles}
        self.cpu += time.process_time() - cpu
        return found

    def cancel(self, handles: Sequence[str]) -> None:
        self.running -= set(handles)

    def _job(self, handle: str) -> Job:
        if handle in self.running:
            return Job(State.RUNNING, "node")
        return Job(State.ENDED, code=0) if handle in self.begun else Job(State.WAITING)

    def _begins(self, handle: str) -> None:
        self.running.add(handle)
        minutes = random.Random(handle).randint(30, 90)
        self.begun[handle], self.ends[handle], self.rows[handle] = self.now, self.now + minutes * MINUTE, 0
        config = json.loads(Path(handle, "config.json").read_bytes())["config"]
        self.lr[handle] = config["trainer"]["lr"]
        Path(handle, "clock.json").write_text(json.dumps({"steps": minutes, "tokens": 1000 * minutes}))

    def _trains(self, handle: str) -> None:
        minutes = int((min(self.now, self.ends[handle]) - self.begun[handle]) / MINUTE)
        if minutes > self.rows[handle]:
            with Path(handle, "metrics.jsonl").open("a") as file:
                for row in range(self.rows[handle] + 1, minutes + 1):
                    loss = {"train/loss": 3.0, "validation/loss": 2 + self.lr[handle] / row}
                    file.write(json.dumps({"step": row, "tokens": 1000 * row, "seconds": MINUTE * row, **loss}) + "\n")
            self.rows[handle] = minutes
        if self.now >= self.ends[handle]:
            self.running.remove(handle)
            Path(handle, "version.json").write_text("{}")


class NoComposing(Freezer):
    """Freezes what differs in the learning rate only, without composing: that is measured apart."""

    def __init__(self, searched: Searched) -> None:
        self.config = searched.config

    def __call__(self, overrides: list[str]) -> Path:
        values = dict(line.partition("=")[::2] for line in overrides)
        trainer = self.config.trainer.model_copy(update={"lr": float(values["trainer.lr"])})
        frozen = FrozenRun(config=self.config.model_copy(update={"trainer": trainer}), resolved=RESOLVED, attempt=1)
        directory = Path(self.config.outputs_dir, self.config.name, frozen.run_id)
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "config.json").write_text(frozen.model_dump_json())
        return directory

    def rest(self) -> None:
        """Nothing to let go."""


def searched(kind: str, points: int, outputs: Path) -> dict[str, Any]:
    """One search of `points`, simulated to its end; then its list, and a controller that is started again."""
    found = load_search([*LINE, f"outputs_dir={outputs}", f"sweep={kind}", f"sweep.trials={points}",
                         f"sweep.concurrent={NODES}", "trainer.lr=tag(log,interval(1e-5,1e-1))"])  # fmt: skip
    assert found is not None
    space, [(_, config), *_] = found
    what = Searched(
        space=space, config=config, config_dirs=(), config_name="train", force=False, directory=str(outputs)
    )
    place = SearchDirectory(SweepDirectory(outputs, what.sweep_id))
    place.place.write(sweep_of("slurm", [], sweep_id=what.sweep_id))
    place.write(what)
    cluster = Cluster()
    controller.engine_of = lambda launch: cluster  # type: ignore[assignment]
    status.engine_of = controller.engine_of
    controller.Freezer = NoComposing  # type: ignore[misc]
    cpu, wall, before = time.process_time(), time.perf_counter(), memory_mb()
    with contextlib.redirect_stdout(io.StringIO()):
        controller.Controller(place, poll_s=0).run()
    cpu, wall = time.process_time() - cpu - cluster.cpu, time.perf_counter() - wall - cluster.cpu
    restart = time.perf_counter()
    controller.Controller(place, poll_s=0)._adopt()
    restart = time.perf_counter() - restart
    listing = time.perf_counter()
    statuses = status.statuses(place.place)
    listing = time.perf_counter() - listing
    counts = Counter(one.state for one in statuses)
    assert counts["finished"] + counts["pruned"] == points
    sizes = {path.name: path.stat().st_size for path in place.path.iterdir() if path.is_file()}
    return {
        "search": kind,
        "points": points,
        "stopped early": counts["pruned"],
        "days on the cluster": cluster.now / 86_400,
        "looks at a job": cluster.looked_at / points,
        "controller, CPU ms a job": cpu / points * 1e3,
        "controller, wall ms a job": wall / points * 1e3,
        "controller, peak MB": memory_mb(),
        "of which before": before,
        "started again, s": restart,
        "llmtrain jobs SWEEP, s": listing,
        "bytes a point in the sweep's directory": sum(sizes.values()) / points,
        "largest file there, MB": max(sizes.values()) / 1e6,
    }


def grid(points: int) -> dict[str, Any]:
    """What each point of a grid costs before it is submitted, and what Slurm's answer about 10,000 costs."""
    cpu = time.process_time()
    load_sweep([*LINE, f"trainer.seed=range({points})"])
    composing = (time.process_time() - cpu) / points
    lines = "\n".join(f"7_{number}|RUNNING|node{number}|None" for number in range(10_000))
    with tempfile.NamedTemporaryFile("w") as file:
        file.write(lines)
        file.flush()
        cpu = time.process_time()
        assert len(slurm._table(["cat", file.name])) == 10_000
    reading = time.process_time() - cpu
    with tempfile.TemporaryDirectory() as directory:
        place = SweepDirectory(Path(directory), "0123abcd")
        place.write(sweep_of("slurm", [Point(overrides=(f"trainer.seed={n}",), run=f"a/{n}") for n in range(10_000)]))
        wall = time.perf_counter()
        for number in range(1000):
            place.submitted(f"a/{number}", f"7_{number}")
        keeping = (time.perf_counter() - wall) / 1000
    return {
        "composing and checking, CPU ms a point": composing * 1e3,
        "keeping a handle (fsync), wall ms a point": keeping * 1e3,
        "squeue's answer about 10,000 jobs, CPU ms": reading * 1e3,
    }


def memory_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--points", type=int, default=10_000)
    parser.add_argument("--grid", type=int, default=200)
    parser.add_argument("--kind", choices=["asha", "tpe"], default="asha")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        found = searched(given.kind, given.points, Path(directory)) | grid(given.grid)
    for name, value in found.items():
        print(f"{name:48} {value:,.2f}" if isinstance(value, float) else f"{name:48} {value}")
    if given.json:
        given.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
