"""Which settings differ by more than their seeds do, and what is written about them."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from llmtrain.config.compose import Composer, load_config
from llmtrain.config.frozen import FrozenRun
from llmtrain.errors import UserError
from llmtrain.launch import status
from llmtrain.launch.best import NAME
from llmtrain.launch.collect import collect, differences_of, settings_of
from llmtrain.launch.status import statuses
from llmtrain.launch.sweeps import Point, SweepDirectory, sweep_of
from tests.unit.launch.stand_ins import RESOLVED, FileEngine

SMOKE = ["experiment=smoke", "tracking=none"]


def finished(outputs: Path, overrides: list[str], value: float) -> Point:
    """A run that has come to its end with that figure."""
    config = load_config([f"outputs_dir={outputs}", *overrides])
    frozen = FrozenRun(config=config, resolved=RESOLVED, attempt=1)
    directory = outputs / config.name / frozen.run_id
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(frozen.model_dump_json())
    row = {"step": 1, "tokens": 9, "seconds": 1.0, "validation/loss": value}
    (directory / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    (directory / "trained.json").write_text(json.dumps({"metrics": {"test/loss": value + 1}}))
    (directory / "version.json").write_text("{}")
    return Point(overrides=tuple(overrides), run=directory.relative_to(outputs).as_posix())


@pytest.fixture
def grid(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SweepDirectory:
    """Three learning rates with three seeds each: the last two are alike."""
    monkeypatch.setattr(status, "engine_of", lambda launch: FileEngine(tmp_path / "engine"))
    figures = {"1e-3": (4.0, 4.1, 4.2), "2e-3": (3.0, 3.1, 3.2), "4e-3": (3.05, 3.15, 3.0)}
    points = [
        finished(tmp_path, [*SMOKE, f"trainer.lr={lr}", f"trainer.seed={seed}"], value)
        for lr, values in figures.items()
        for seed, value in enumerate(values)
    ]
    sweep = sweep_of("local", points)
    place = SweepDirectory(tmp_path, sweep.sweep_id)
    place.write(sweep)
    return place


def test_differences_are_those_of_scipy_corrected_after_holm(grid: SweepDirectory):
    settings = settings_of(statuses(grid), ["trainer.lr"], "validation/loss")
    assert [one.figures for one in settings][1] == [3.0, 3.1, 3.2]
    assert settings[1].standard_error == pytest.approx(0.1 / np.sqrt(3))
    pairs = differences_of(settings)
    raw = [stats.ttest_ind(pair.one.figures, pair.other.figures, equal_var=False).pvalue for pair in pairs]
    assert [pair.p for pair in pairs] == pytest.approx(raw)
    order = np.argsort(raw)
    by_hand = np.maximum.accumulate([min(1, (3 - rank) * raw[i]) for rank, i in enumerate(order)])
    assert [pairs[i].p_holm for i in order] == pytest.approx(by_hand)
    assert [pair.beyond_noise for pair in pairs] == [True, True, False]


def test_what_is_said_and_written(grid: SweepDirectory):
    said = collect(grid)
    assert "| 2     | 2e-3       | 3     | 3.1000          | 0.0577         | finished |" in said
    assert "best: point 3, trainer.lr=4e-3: validation/loss 3.0667" in said
    assert "2 of 3 pairs differ by more than the seed noise (Welch's t-test, two-sided, Holm-corrected, 5%)" in said
    assert "not told apart from the best: 2" in said
    assert (grid.path / "points.md").read_text() in said + "\n"
    rows = list(csv.DictReader((grid.path / "points.csv").open()))
    assert [row["trainer.lr"] for row in rows] == ["1e-3", "2e-3", "4e-3"]
    runs = list(csv.DictReader((grid.path / "runs.csv").open()))
    assert [(row["seed"], row["test/loss"]) for row in runs[:2]] == [("0", "5.0"), ("1", "5.1")]
    assert len(list(csv.DictReader((grid.path / "differences.csv").open()))) == 3
    assert (grid.path / "plots" / "by-trainer.lr.png").read_bytes().startswith(b"\x89PNG")


def test_the_best_point_is_an_experiment_that_makes_the_same_run(grid: SweepDirectory):
    collect(grid)
    path = grid.path / "conf" / "experiment" / f"{NAME}.yaml"
    lines = path.read_text().splitlines()
    assert lines[0] == "# @package _global_"
    assert lines[1] == f"# python train.py experiment={NAME} --config-dir {grid.path / 'conf'}"
    assert lines[2] == "# Expected: validation/loss 3.0667 ± 0.0441 (mean of 3 seeds)."
    config = Composer([grid.path / "conf"]).check([f"experiment={NAME}"]).good()
    best = grid.read().points[6]
    again = FrozenRun(config=config, resolved=RESOLVED, attempt=1)
    first = load_config([*best.overrides, "infra.precision=bf16_if_fast"])
    assert f"smoke/{again.run_id}" == best.run
    assert (config.trainer, config.model, config.data, config.name) == (
        first.trainer, first.model, first.data, first.name)  # fmt: skip


def test_with_one_seed_the_noise_is_unknown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(status, "engine_of", lambda launch: FileEngine(tmp_path / "engine"))
    varied = (("1e-3", "qwen3_tiny", 3.0), ("2e-3", "qwen3_small", 4.0), ("3e-3", "qwen3_small", 3.5))
    points = [finished(tmp_path, ["trainer.lr=" + lr, "model=" + model], value) for lr, model, value in varied]
    sweep = sweep_of("local", points)
    place = SweepDirectory(tmp_path, sweep.sweep_id)
    place.write(sweep)
    said = collect(place)
    assert "no two points have several seeds, so their noise is unknown; add trainer.seed=0,1,2" in said
    assert {path.name for path in (place.path / "plots").iterdir()} == {
        "by-trainer.lr.png", "by-model.png", "parallel.png"}  # fmt: skip


def test_nothing_to_collect_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(status, "engine_of", lambda launch: FileEngine(tmp_path / "engine"))
    point = finished(tmp_path, [*SMOKE], 1.0)
    (tmp_path / point.run / "version.json").unlink()
    sweep = sweep_of("local", [point])
    place = SweepDirectory(tmp_path, sweep.sweep_id)
    place.write(sweep)
    with pytest.raises(UserError, match=r"has ended with a figure 'validation/loss'"):
        collect(place)
