"""A traced step against a real one: what autograd keeps, what is alive at most, deep networks from shallow ones."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from llmtrain.models import attention
from llmtrain.models.build import build
from llmtrain.models.head import loss_of_tokens
from llmtrain.models.logprobs import hidden_states
from llmtrain.models.packed import document, pack
from llmtrain.plan import step as step_module
from llmtrain.plan.step import trace_step
from tests.unit.plan.conftest import TOY, PlannerOf


def real_step(precision: str, planner_of: PlannerOf) -> tuple[Callable[[], None], dict[int, int], torch.nn.Module]:
    """(a micro-batch, the bytes of each storage that autograd kept in it, the network)."""
    planner = planner_of(*TOY)
    model = build(planner.config.model)
    attention.use(model, "segments")
    packed = pack([document(torch.arange(33).numpy()) for _ in range(4)])
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
        return tensor

    def micro_batch() -> None:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bf16"):
                hidden = keep(hidden_states(model, packed))  # alive too, for the head
            for tensor in (*model.parameters(), *model.buffers(), packed.ids, packed.positions, packed.predictors):
                kept.pop(tensor.untyped_storage()._cdata, None)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bf16"):
            loss = loss_of_tokens(hidden, model.get_output_embeddings().weight, packed.targets, 1.0, 1024)
        loss.backward()

    return micro_batch, kept, model


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_what_autograd_keeps(precision: str, planner_of: PlannerOf):
    micro_batch, kept, _ = real_step(precision, planner_of)
    micro_batch()
    traced = planner_of(*TOY, f"infra.precision={precision}").step.first.peaks["head"]["activations"]
    inputs = 4 * 128 * 8  # ids, places of targets, targets and owners, which training has before the step begins
    assert traced == pytest.approx(sum(kept.values()) + inputs, abs=16)


def test_what_is_alive_at_most(planner_of: PlannerOf):
    """By torch's profiler, which sees each allocation; the second micro-batch adds to gradients."""
    micro_batch, _, model = real_step("fp32", planner_of)
    micro_batch()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        micro_batch()
    held = peak = 0
    for event in sorted(
        (e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"), key=lambda e: e.start_ns()
    ):
        held += event.nbytes()
        peak = max(peak, held)
    step = planner_of(*TOY).step
    before = step.weights + step.gradients + step.optimizer + 4 * 128 * 512  # the head keeps its buffer of logits
    assert sum(p.numel() * 4 for p in model.parameters()) == step.gradients
    assert sum(step.more.peak.values()) - before == pytest.approx(peak, rel=0.02)


def test_the_optimizer_is_there_from_the_second_step_on(planner_of: PlannerOf):
    step = planner_of(*TOY).step
    assert step.optimizer == pytest.approx(2 * step.gradients, abs=200)  # two moments; a counter for each tensor
    assert step.peak(1)["optimizer"] == step.peak(2)["optimizer"] == step.optimizer
    assert (step.peak(1)["gradients"], step.peak(2)["gradients"]) == (0, step.gradients)


@pytest.mark.parametrize("overrides", [(), ("adapter=lora",), ("infra.activation_checkpointing=full",)])
def test_a_deep_network_is_two_shallow_ones_and_their_difference(
    overrides: tuple[str, ...], planner_of: PlannerOf, monkeypatch: pytest.MonkeyPatch
):
    planner = planner_of(*TOY, "infra=h100", "model.num_hidden_layers=7", *overrides)
    short = planner.step
    monkeypatch.setattr(step_module, "DEEP", 100)
    whole = trace_step(planner.config, planner.recipe_of(planner.config), planner.workload.largest)
    assert short.shallow is not None
    assert whole.shallow is None
    for name in ("weights", "gradients", "num_trained", "linear_weights", "attention_width"):
        assert getattr(short, name) == getattr(whole, name)
    assert short.peak(2) == whole.peak(2)
    assert short.more.num_flops() == whole.more.num_flops()
    assert short.more.ops == whole.more.ops


def test_recomputation_keeps_less(planner_of: PlannerOf):
    kept = {}
    for kind in ("none", "selective", "full"):
        step = planner_of(*TOY, f"infra.activation_checkpointing={kind}").step
        kept[kind] = step.first.peaks["head"]["activations"]
    assert kept["none"] > kept["selective"] > kept["full"]
    assert kept["full"] < 0.15 * kept["none"]
