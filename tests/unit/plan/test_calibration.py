"""What plans learn from runs: factors that are known come back, one disturbed run spoils nothing."""

import random
from pathlib import Path

import pytest

from llmtrain.plan.actual import FILE, in_words, record
from llmtrain.plan.calibration import LOADED_BYTES, SECONDS_PER_CALL, calibrated, runs_on
from llmtrain.plan.records import CLASSES, Features, Figures, PlanVsActual, Prediction

FACTORS = {"gemm": 1.2, "attention": 0.9, "elementwise": 1.5, "head": 1.1, "optimizer": 1.0, "calls": 1.3}


def run(
    seconds: dict[str, float],
    calls: float,
    heap_bytes: int,
    slower: float = 1.0,
    machine: str = "here",
    slowdown: float = 1.0,
) -> PlanVsActual:
    """A run that took what FACTORS say, on 600 MB of interpreter, 150 MB of libraries and 1.05 times its heap, where
    products of 1 ms took `slowdown` ms."""
    features = Features(
        seconds=seconds, product_seconds=0.001, calls=calls, heap_bytes=heap_bytes, baseline_bytes=600_000_000
    )
    by_class = {name: FACTORS[name] * value for name, value in seconds.items()}
    by_class["calls"] = FACTORS["calls"] * SECONDS_PER_CALL * calls
    took = sum(value if name in ("elementwise", "optimizer") else slowdown * value for name, value in by_class.items())
    figures = {"tokens_per_second": 1.0, "mfu_half": 0.1, "mfu_full": 0.1}
    measured = Figures(peak_bytes=round(600e6 + 150e6 + 1.05 * heap_bytes), seconds_per_step=took * slower, **figures)
    prediction = Prediction(
        machine={"device": machine},
        features=features,
        predicted=measured,
        tokens_per_step=1.0,
        flops_per_token_half=1.0,
        flops_per_token_full=1.0,
        peak_flops_per_second=1.0,
        calibrated_from=0,
    )
    return PlanVsActual(
        prediction=prediction,
        measured=measured,
        num_steps=5,
        peak_error=0.0,
        seconds_error=0.0,
        product_seconds=0.001 * slowdown,
    )


def runs(count: int, *slowdowns: float) -> list[PlanVsActual]:
    draw = random.Random(0)
    found = []
    for number in range(count):
        seconds, calls = {name: draw.uniform(0.01, 1.0) for name in CLASSES}, draw.uniform(1e3, 1e5)
        slowdown = slowdowns[number % len(slowdowns)] if slowdowns else 1.0
        found.append(run(seconds, calls, draw.randrange(10**8, 10**9), slowdown=slowdown))
    return found


def test_without_runs_kernels_take_what_they_were_timed_at():
    found = calibrated([])
    assert set(found.factors.values()) == {1.0}
    assert (found.heap_factor, found.loaded_bytes, found.num_runs) == (1.0, LOADED_BYTES, 0)


def test_factors_come_back_from_many_runs():
    found = calibrated(runs(200))
    for name in CLASSES:
        assert found.factors[name] == pytest.approx(FACTORS[name], rel=0.05)
    assert found.loaded_bytes == pytest.approx(150e6, rel=0.1)
    assert found.heap_factor == pytest.approx(1.05, rel=0.01)


def test_runs_on_a_machine_that_others_used_teach_the_same():
    found = calibrated(runs(200, 1.0, 1.4, 2.0))
    for name in CLASSES:
        assert found.factors[name] == pytest.approx(FACTORS[name], rel=0.05)
    assert found.slowdown == pytest.approx(1.4)  # the median: what is expected of the next run
    new = run({"gemm": 1.0, "elementwise": 0.2}, 0, 10**8, slowdown=1.4)
    assert sum(found.seconds(new.prediction.features).values()) == pytest.approx(1.4 * 1.2 + 0.2 * 1.5, rel=0.05)


def test_a_new_run_is_predicted_from_four_others():
    found, new = calibrated(runs(4)), runs(5)[4]
    assert sum(found.seconds(new.prediction.features).values()) == pytest.approx(new.measured.seconds_per_step, rel=0.1)
    assert found.peak_bytes(new.prediction.features) == pytest.approx(new.measured.peak_bytes, rel=0.05)


def test_one_disturbed_run_spoils_nothing():
    good = runs(8)
    features = good[0].prediction.features
    disturbed = run(features.seconds, features.calls, features.heap_bytes, slower=5.0)
    with_it, new = calibrated([*good, disturbed]), runs(9)[8]
    found = sum(with_it.seconds(new.prediction.features).values())
    assert found == pytest.approx(new.measured.seconds_per_step, rel=0.1)


def test_only_runs_of_this_machine_count(tmp_path: Path):
    for name, machine in (("one", "here"), ("two", "elsewhere"), ("three", "here")):
        directory = tmp_path / "experiment" / name
        directory.mkdir(parents=True)
        (directory / FILE).write_text(run({"gemm": 1.0}, 1, 1, machine=machine).model_dump_json())
    (tmp_path / "experiment" / "three" / FILE).write_text('{"written": "by another version"}')
    assert [found.prediction.machine for found in runs_on(tmp_path, {"device": "here"})] == [{"device": "here"}]


def test_a_record_holds_the_median_step_against_the_plan(tmp_path: Path):
    prediction = run({"gemm": 1.0}, 0, 10**8).prediction.model_copy(
        update={"tokens_per_step": 100.0, "flops_per_token_half": 3e6, "peak_flops_per_second": 1e9}
    )
    prediction = prediction.model_copy(
        update={"predicted": prediction.predicted.model_copy(update={"seconds_per_step": 1.1, "peak_bytes": 950})}
    )
    seconds, tokens = [9.0, 9.0, 9.0, 1.0, 2.0, 0.5, 1.0], [100, 100, 100, 100, 200, 50, 90]  # three to warm up
    found = record(tmp_path, prediction, seconds, tokens, peak_bytes=1000, product_seconds=[0.0005, 0.0015])
    assert found is not None
    assert PlanVsActual.model_validate_json((tmp_path / FILE).read_bytes()) == found
    assert found.measured.seconds_per_step == pytest.approx(1.0)
    assert found.measured.tokens_per_second == pytest.approx(100)
    assert found.measured.mfu_half == pytest.approx(0.3)  # 100 tokens a second of 3 MFLOP, of 1 GFLOP/s
    assert (found.peak_error, found.seconds_error) == (pytest.approx(-0.05), pytest.approx(0.1))
    assert found.product_seconds == pytest.approx(0.001)
    assert "(-5.0%)" in in_words(found)
    assert record(tmp_path / "none", prediction, [], [], peak_bytes=1) is None
