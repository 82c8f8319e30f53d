"""Shares of time and counts of waits, by hand."""

import warnings
from typing import Any

import pytest

from llmtrain.config.frozen import FrozenRun
from llmtrain.doctor import slow
from llmtrain.doctor.slow import Sizes
from llmtrain.telemetry.vitals import Vitals, count_syncs

ROW = {"step": 10, "tokens": 1000, "losses": (3.0,) * 10, "grad_norms": (1.0,) * 10, "steps_here": 10,
       "time_utc": "2026-01-02T03:04:05+00:00", "first_of_process": False, "num_compiled": 0, "compile_seconds": 0.0,
       "compile_reasons": {}, "host_syncs": {}, "peak_memory_bytes": 1,
       "seconds": {"data": 0.1, "forward_backward": 8.0, "optimizer": 1.9}}  # fmt: skip


def row(**changes: Any) -> Vitals:
    return Vitals(**{**ROW, **changes})


def test_waiting_for_data_is_a_share_of_the_time_and_a_time_a_step(frozen: FrozenRun):
    line, finding = slow.data_stall([row()], frozen)
    assert (line, finding) == ("waiting for data: 1% of the time, 10.0 ms a step", None)
    stalled = row(step=20, seconds={"data": 10.0, "forward_backward": 8.0, "optimizer": 1.9})
    _, finding = slow.data_stall([row(), stalled], frozen)
    assert finding is not None
    assert finding.cost_share == pytest.approx(10.1 / 29.9)
    assert "worst 1000.0 ms a step, in steps 11 to 20" in finding.seen
    fast = row(seconds={"data": 0.03, "forward_backward": 0.05, "optimizer": 0.01})
    assert slow.data_stall([fast], frozen)[1] is None, "3 ms a step are a loop's own"


def test_evaluations_that_take_half_of_the_time_are_spread_out(frozen: FrozenRun):
    """10 of 20 s: at 19 times the distance they take 10 of 200, a twentieth."""
    seconds = {"data": 0.0, "forward_backward": 8.0, "optimizer": 2.0, "evaluation": 6.0, "report": 4.0}
    (_, finding), (_, none) = slow.between_steps([row(seconds=seconds)], frozen)
    assert none is None
    assert finding is not None
    every = frozen.config.trainer.evaluate_every_tokens
    assert finding.remedies == (f"trainer.evaluate_every_tokens={19 * every} makes that about 5 % (now {every})",)


def test_blocks_that_are_compiled_again_and_again_are_told_with_the_reason(frozen: FrozenRun):
    infra = frozen.config.infra.model_copy(update={"compile": True, "micro_batch_tokens": 512})
    first = row(first_of_process=True, num_compiled=30, compile_seconds=60.0)
    evaluated = row(num_compiled=1, compile_seconds=1.0, compile_reasons={"GLOBAL_STATE changed: grad_mode": 1})
    line, finding = slow.recompiles([first, evaluated, row()], infra, None)
    assert (line, finding) == ("torch.compile: 31 graphs, 1 of them for what was compiled before", None)
    reasons = {"size mismatch at index 0. expected 40, actual 48": 5}
    later = row(num_compiled=5, compile_seconds=4.0, compile_reasons=reasons)
    _, finding = slow.recompiles([first, later, row()], infra, Sizes([600, 640], [600, 630], 1))
    assert finding is not None
    assert finding.details == ("5 times: size mismatch at index 0. expected 40, actual 48",)
    assert finding.remedies[0].startswith("infra.micro_batch_tokens=640 pads all rows to one shape")
    assert finding.cost_share == pytest.approx(4 / 30)


def test_padding_is_a_share_of_the_tokens_computed(frozen: FrozenRun):
    infra = frozen.config.infra.model_copy(update={"compile": True, "micro_batch_tokens": 1000})
    sizes = Sizes([1024, 1024], [700, 500], 1)
    assert slow.better(sizes) == 768
    line, finding = slow.padding_waste([row()], infra, sizes, Sizes([768, 768], [700, 500], 1))
    assert line == "padding: 41% of the tokens computed, in 1 steps sampled"
    assert finding is not None
    assert finding.facts == {"share": 1 - 1200 / 2048, "row_tokens": 1024}
    assert finding.cost_share == pytest.approx((1 - 1200 / 2048) * 0.8)
    assert finding.remedies[0] == "infra.micro_batch_tokens=768 leaves 22% padding"
    assert slow.padding_waste([row()], infra, Sizes([1024], [1000], 1), None)[1] is None


def test_waits_for_the_gpu_are_counted_by_place_and_other_warnings_are_left(recwarn: pytest.WarningsRecorder):
    message = "called a synchronizing CUDA operation (Triggered internally at CUDAFunctions.cpp:150.)"
    for number, file in ((3, "/a/llmtrain/training/module.py"), (2, "/a/b/mine.py")):
        for _ in range(number):
            warnings.warn_explicit(message, UserWarning, file, 7)
    warnings.warn_explicit("something else", UserWarning, "/a/c.py", 1)
    syncs, others = count_syncs(recwarn.list)
    assert syncs == {"llmtrain/training/module.py:7": 3, "a/b/mine.py:7": 2}
    assert [str(other.message) for other in others] == ["something else"]


def test_waits_for_the_gpu_are_many_where_each_micro_batch_has_more_than_its_own():
    """16 micro-batches: 8 + 2 * 16 = 40 waits are a step's own."""
    own = row(host_syncs={"training/module.py:97": 2, "models/head.py:48": 32})
    assert slow.host_syncs([own, row()], 16.0)[1] is None
    line, finding = slow.host_syncs([row(host_syncs={"training/module.py:97": 2, "mine.py:1": 160}), row()], 16.0)
    assert line == "waiting for the GPU: 162 times a step of 16 micro-batches"
    assert finding is not None
    assert finding.details == ("160 a step at mine.py:1", "2 a step at training/module.py:97")
    assert finding.facts["syncs_a_step"] == 162
