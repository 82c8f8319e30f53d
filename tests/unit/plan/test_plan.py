"""Whole plans: what they say, to people and machines, and what is refused."""

import json
import time
from pathlib import Path

import jsonschema
import pytest

from llmtrain.cli import plan as command
from llmtrain.errors import UserError
from llmtrain.plan.make import refuse
from llmtrain.plan.records import Plan
from llmtrain.plan.table import page
from tests.unit.plan.conftest import PlannerOf

H100 = ("model=qwen3_0_6b", "infra=h100", "trainer.sequence_tokens=2048", "trainer.batch_rows=256")
BUDGET = "trainer.budget_tokens=1000000000"


def test_qwen3_0_6b_on_an_h100(planner_of: PlannerOf):
    started = time.process_time()
    plan = planner_of(*H100, BUDGET, "infra.micro_batch_tokens=16384").plan()
    assert time.process_time() - started < 5
    assert (plan.parameters, plan.parameters_without_embeddings) == (596_049_920, 440_467_456)
    assert (plan.steps, plan.tokens) == (1907, 1907 * 256 * 2048)
    assert plan.fits
    per_token = plan.causal_half.forward_per_token + plan.causal_half.backward_per_token
    assert per_token == pytest.approx(4.28e9, rel=1e-3)
    assert plan.causal_half.total == pytest.approx(per_token * plan.tokens)
    assert plan.tokens_per_second == pytest.approx(0.4 * 989.4e12 / per_token)  # 40 % of the peak, assumed
    assert plan.causal_half.mfu == pytest.approx(0.4)
    assert plan.causal_full.mfu == pytest.approx(0.4 * 4.99 / 4.28, rel=2e-3)
    assert plan.eta_seconds == pytest.approx(plan.tokens / plan.tokens_per_second)
    assert plan.watt_hours == pytest.approx(plan.eta_seconds / 3600 * 700)
    assert plan.cost_usd == pytest.approx(plan.eta_seconds / 3600 * 12.29)
    assert plan.memory.weights == pytest.approx(4 * plan.parameters, rel=1e-4)
    assert "nanochat" in plan.mfu_because


def test_eight_h100_share_tokens_and_weights(planner_of: PlannerOf):
    one = planner_of(*H100, BUDGET, "infra.micro_batch_tokens=16384").plan()
    eight = planner_of(*H100, BUDGET, "infra.micro_batch_tokens=16384", "infra=h100_x8").plan()
    assert eight.memory.weights == one.memory.weights // 8
    assert eight.tokens_per_step == one.tokens_per_step
    assert eight.tokens_per_second == pytest.approx(8 * one.tokens_per_second, rel=0.01)
    assert eight.cost_usd == pytest.approx(one.cost_usd, rel=0.01)


def test_what_does_not_fit_is_refused_with_what_would(planner_of: PlannerOf):
    planner = planner_of(
        "infra=h100", "infra.hardware.memory_gib=1.5", "trainer.batch_rows=256", "infra.compile=false"
    )  # qwen3_small
    plan = planner.plan()
    assert not plan.fits
    assert plan.remedies[0] == f"infra.micro_batch_tokens={plan.largest_micro_batch_tokens}"
    assert planner.with_overrides(plan.remedies[0]).fits
    assert not planner.with_overrides(f"infra.micro_batch_tokens={2 * plan.largest_micro_batch_tokens}").fits
    with pytest.raises(UserError, match=r"(?s)needs \d+\.\d GiB.*micro_batch_tokens=\d+.*--force"):
        refuse(planner)
    refuse(planner.with_overrides(plan.remedies[0]))


def test_compiled_blocks_are_not_refused_because_they_are_planned_as_if_they_were_not(planner_of: PlannerOf):
    planner = planner_of("infra=h100", "infra.hardware.memory_gib=1.5", "trainer.batch_rows=256", "infra.compile=true")
    assert not planner.fits
    refuse(planner)


def test_a_model_that_is_too_large_needs_lora_or_more_devices(planner_of: PlannerOf):
    plan = planner_of(
        "model=qwen3_8b", "infra=h100", "trainer.sequence_tokens=1024", "infra.micro_batch_tokens=1024"
    ).plan()
    assert not plan.fits  # 8.2 billion weights, gradients and two moments, 4 bytes each, are 122 GiB
    assert plan.largest_micro_batch_tokens == 0
    assert plan.remedies == (
        "adapter=lora",
        "infra.strategy=fsdp2 infra.ranks=4",
    )  # 61 on each of two, with activations


@pytest.mark.parametrize("trainer", ["pretrain", "sft", "dpo", "kto", "distill"])
def test_every_trainer_has_a_plan_here(trainer: str, planner_of: PlannerOf):
    more = ["trainer.teacher=x"] if trainer == "distill" else []
    planner = planner_of("model=qwen3_tiny", f"trainer={trainer}", "infra.micro_batch_tokens=512", *more)
    plan = planner.plan()
    assert plan.fits
    assert plan.seconds_per_step == pytest.approx(sum(plan.seconds_by_class.values()))
    assert all(plan.seconds_by_class[name] > 0 for name in ("gemm", "attention", "elementwise", "head", "calls"))
    assert plan.peak_bytes == plan.process_bytes + sum(plan.memory.model_dump().values()) + plan.fragmentation_bytes
    assert (plan.watt_hours, plan.cost_usd) == (None, None)
    text = page(plan)
    for word in ("causal half", "causal in full", "each kernel timed on this machine", "bound by", "largest"):
        assert word in text
    kernels = next((planner.outputs / "plan").glob("kernels-*.json"))
    assert planner.prediction().predicted.seconds_per_step == plan.seconds_per_step
    written = kernels.stat().st_mtime_ns
    assert planner.with_overrides("infra.loss_chunk_tokens=1024").plan().seconds_per_step == plan.seconds_per_step
    assert kernels.stat().st_mtime_ns == written  # nothing is timed twice


def test_json_follows_its_schema(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    words = ["infra=h100", "infra.hardware.memory_gib=1.5", "trainer.batch_rows=256", f"outputs_dir={tmp_path}"]
    assert command.main([*words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    jsonschema.validate(found, Plan.model_json_schema())
    assert found["hardware"].startswith("NVIDIA H100")
    assert found["fits"] is False  # an answer, no error


def test_all_kinds_of_machines_in_one_table(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(command, "_process_bytes", lambda outputs: 500_000_000)
    words = ["model=qwen3_tiny", "infra.micro_batch_tokens=512", f"outputs_dir={tmp_path}", "--all-infra"]
    assert command.main(words) == 0
    lines = capsys.readouterr().out.splitlines()
    assert {line.split()[0] for line in lines} >= {"infra", "local_cpu", "local_gpu", "h100", "h100_x8", "aks_h100"}
    assert next(line for line in lines if line.startswith("h100 ")).split()[-1].startswith("$")


def test_a_typo_is_named_before_anything_heavy(capsys: pytest.CaptureFixture[str]):
    assert command.main(["infra=h10"]) == 2
    assert "did you mean 'h100'" in capsys.readouterr().err
