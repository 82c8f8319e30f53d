"""The record of what was submitted."""

from pathlib import Path

import pytest

from llmtrain.errors import IntegrityError, UserError
from llmtrain.launch.sweeps import Point, SweepDirectory, all_sweeps, sweep_of

POINTS = [
    Point(overrides=("model=qwen3_tiny", "trainer.lr=1e-3", "trainer.seed=1"), run="smoke/a"),
    Point(overrides=("model=qwen3_tiny", "trainer.lr=3e-3", "trainer.seed=1"), run="smoke/b"),
]


def test_the_same_runs_are_the_same_sweep_in_any_order_and_another_engine_is_another():
    sweep = sweep_of("slurm", POINTS)
    assert sweep_of("slurm", POINTS[::-1]).sweep_id == sweep.sweep_id
    assert sweep_of("ray", POINTS).sweep_id != sweep.sweep_id
    assert sweep_of("slurm", POINTS[:1]).sweep_id != sweep.sweep_id
    assert len(sweep.sweep_id) == 8


def test_what_differs_from_point_to_point():
    assert sweep_of("slurm", POINTS).varied == ["trainer.lr"]
    assert sweep_of("slurm", POINTS[:1]).varied == []


def test_the_newest_handle_of_a_run_counts_and_a_torn_line_does_not(tmp_path: Path):
    place = SweepDirectory(tmp_path, "0123abcd")
    place.write(sweep_of("slurm", POINTS))
    assert place.handles() == {}
    place.submitted("smoke/a", "1_0")
    place.submitted("smoke/b", "1_1")
    place.submitted("smoke/a", "2")
    with (place.path / "jobs.jsonl").open("a") as file:
        file.write('{"run": "smoke/b", "handle": "3')
    assert place.handles() == {"smoke/a": "2", "smoke/b": "1_1"}


def test_a_sweep_that_is_not_there_is_told_with_those_that_are(tmp_path: Path):
    with pytest.raises(UserError, match=r"ffff: no such sweep in .* \(there: none\)"):
        SweepDirectory(tmp_path, "ffff").read()
    sweep = sweep_of("slurm", POINTS)
    SweepDirectory(tmp_path, sweep.sweep_id).write(sweep)
    with pytest.raises(UserError, match=rf"there: {sweep.sweep_id}"):
        SweepDirectory(tmp_path, "ffff").read()
    assert [place.path.name for place in all_sweeps(tmp_path)] == [sweep.sweep_id]
    (tmp_path / "sweeps" / sweep.sweep_id / "sweep.json").write_text("{}")
    with pytest.raises(IntegrityError, match="is damaged"):
        SweepDirectory(tmp_path, sweep.sweep_id).read()
