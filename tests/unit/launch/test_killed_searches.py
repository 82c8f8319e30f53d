"""A controller that is killed, wherever it is, and started again neither loses a point nor does one twice."""

import json
import multiprocessing
import random
import time
from collections import Counter
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import pytest
from optuna.storages.journal._storage import JournalOperation

from llmtrain.launch.search import STUDY, SearchDirectory
from tests.unit.launch.stand_ins import FileEngine, search, work

POINTS = 12
KILLS = 25
ROW_S = 0.01
ASHA = ("sweep=asha", "sweep.trials=2", "sweep.rung_tokens=1_000_000", "trainer.evaluate_every_tokens=1_000")
TPE = ("sweep=tpe", f"sweep.trials={POINTS}", "sweep.startup=4")


@pytest.fixture(scope="module")
def processes() -> multiprocessing.context.ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.unit.launch.stand_ins"])
    return context


class Searches:
    """Starts controllers of one search."""

    def __init__(self, processes: multiprocessing.context.ForkServerContext, place: SearchDirectory) -> None:
        self.processes, self.place = processes, place

    def start(self, dies_at: int | None = None) -> ForkServerProcess:
        process = self.processes.Process(target=work, args=(str(self.place.path), ROW_S, dies_at))
        process.start()
        return process

    def to_the_end(self) -> None:
        process = self.start()
        process.join(60)
        assert process.exitcode == 0

    def proposals(self) -> list[tuple[str, ...]]:
        return [point.overrides for point in self.place.place.begun().values()]

    def check(self, points: int) -> None:
        """Each point is there, ran once, and was told once."""
        begun = self.place.place.begun()
        assert list(begun) == list(range(points))
        assert all(point.verdict == "done" for point in begun.values())
        runs = [run for point in begun.values() for run in point.runs]
        assert len(set(runs)) == points
        submitted = FileEngine(self.place.path / "engine").submitted()
        assert submitted == sorted(str(self.place.place.outputs / run) for run in runs), "a run was submitted twice"
        journal = [json.loads(line) for line in (self.place.path / STUDY).read_text().splitlines()]
        ends = [one for one in journal if one["op_code"] == JournalOperation.SET_TRIAL_STATE_VALUES]
        told = Counter(one["trial_id"] for one in ends if one["state"] == 1)  # COMPLETE
        assert sorted(told.values()) == [1] * points


def test_kills_at_random_moments_change_nothing(
    processes: multiprocessing.context.ForkServerContext, tmp_path: Path, record_property
):
    undisturbed = Searches(processes, search(tmp_path / "one", *TPE, "sweep.concurrent=1"))
    undisturbed.to_the_end()
    undisturbed.check(POINTS)

    disturbed = Searches(processes, search(tmp_path / "other", *TPE, "sweep.concurrent=1"))
    draw, kills = random.Random(5), 0
    while kills < KILLS:
        process = disturbed.start()
        time.sleep(draw.uniform(0.01, 0.16))
        if not process.is_alive():
            break
        process.kill()
        process.join()
        kills += 1
    assert kills >= 10
    disturbed.to_the_end()
    disturbed.check(POINTS)
    assert disturbed.proposals() == undisturbed.proposals()


def test_a_kill_after_any_write_changes_nothing(processes: multiprocessing.context.ForkServerContext, tmp_path: Path):
    """Two points at a time, so that a kill finds one of them anywhere."""
    expected = None
    for number in range(1, 1000):
        one = Searches(processes, search(tmp_path / str(number), *ASHA))
        process = one.start(dies_at=number)
        process.join(60)
        if process.exitcode == 0:
            break  # it has fewer writes
        one.to_the_end()
        one.check(2)
        expected = expected or one.proposals()
        assert one.proposals() == expected, "proposals at random depend on nothing but the seed"
    assert number > 15
