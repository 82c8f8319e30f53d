"""What each rank holds, by hand from one rank's parts."""

import pytest

from llmtrain.plan.memory import bytes_between_ranks, per_rank
from tests.unit.plan.conftest import TOY, PlannerOf

WEIGHTS = 4 * (2 * (3 * 64 * 160 + 2 * 64 * 64 + 2 * 64 * 32) + 64 * 512 + 2 * (2 * 64 + 2 * 16) + 64)
"""Bytes in fp32: matrices, the tied embedding, norms of layers, of queries and keys, and the last one."""
BLOCK = 4 * (3 * 64 * 160 + 2 * 64 * 64 + 2 * 64 * 32 + 2 * 64 + 2 * 16)
EMBEDDING = 4 * 64 * 512


@pytest.mark.parametrize(
    ("strategy", "weights", "gradients", "moments", "workspace"),
    [
        ("ddp", WEIGHTS, WEIGHTS, 2 * WEIGHTS, WEIGHTS),
        ("fsdp2", WEIGHTS / 4, WEIGHTS / 4, WEIGHTS / 2, 3 * BLOCK + EMBEDDING),
        ("deepspeed_zero2", WEIGHTS, WEIGHTS / 4, 3 * WEIGHTS / 4, WEIGHTS),
        ("deepspeed_zero3", WEIGHTS / 4, WEIGHTS / 4, 3 * WEIGHTS / 4, 2 * WEIGHTS),
        ("tensor_parallel", (WEIGHTS - EMBEDDING) / 4 + EMBEDDING, None, None, 0),
    ],
)
def test_four_ranks(
    strategy: str,
    weights: float,
    gradients: float | None,
    moments: float | None,
    workspace: float,
    planner_of: PlannerOf,
):
    planner = planner_of(*TOY)
    step, alone = planner.step, per_rank(planner.step, planner.config.infra, 1)
    assert step.gradients == WEIGHTS
    infra = planner.config.infra.model_copy(update={"ranks": 4, "strategy": strategy})
    parts = per_rank(step, infra, 1).parts
    small = 1000  # buffers, and counters of the optimizer
    assert parts["weights"] == pytest.approx(weights, abs=small)
    if gradients is not None:
        assert parts["gradients"] == pytest.approx(gradients, abs=small)
        assert parts["optimizer"] == pytest.approx(moments, abs=small)
    assert parts["workspace"] - alone.parts["workspace"] == pytest.approx(workspace, abs=small)
    assert parts["activations"] == alone.parts["activations"]


def test_offload_moves_to_the_host(planner_of: PlannerOf):
    planner = planner_of(*TOY)
    infra = planner.config.infra.model_copy(update={"ranks": 2, "strategy": "fsdp2", "offload": True})
    found = per_rank(planner.step, infra, 1)
    assert (found.parts["weights"], found.parts["optimizer"]) == (0, 0)
    assert found.on_host == pytest.approx(4 * WEIGHTS / 2, abs=1000)


def test_bytes_between_ranks(planner_of: PlannerOf):
    planner = planner_of(*TOY)
    for ranks, strategy, wanted in ((1, "ddp", 0), (2, "ddp", WEIGHTS), (4, "fsdp2", 0.75 * 5 * 3 * WEIGHTS)):
        infra = planner.config.infra.model_copy(update={"ranks": ranks, "strategy": strategy})
        assert bytes_between_ranks(planner.step, infra, 5) == pytest.approx(wanted, rel=0.01)


def test_four_bit_weights(planner_of: PlannerOf):
    """86,016 entries of frozen matrices: half a byte each, and for 64 of them a byte and a 256th of four."""
    plain = planner_of(*TOY, "infra=h100", "adapter=lora").step.weights
    packed = planner_of(*TOY, "infra=h100", "adapter=qlora").step.weights
    assert plain - packed == pytest.approx(86016 * (4 - 0.5 - (1 + 4 / 256) / 64), abs=20)


def test_a_logit_takes_eight_bytes_in_bf16_by_torch_and_two_by_liger(planner_of: PlannerOf):
    """By torch a product in bf16, its fp32 form, and its gradient in bf16; Liger's kernel keeps to the product."""
    sizes = ("infra=h100", "infra.precision=bf16", "infra.micro_batch_tokens=256", "infra.loss_chunk_tokens=256")
    by_torch = planner_of(*TOY, *sizes, "infra.loss_kernel=torch").step
    by_liger = planner_of(*TOY, *sizes, "infra.loss_kernel=liger").step
    rows, columns = by_torch.row.num_targets, 512
    peaks = [step.first.peaks["head"]["logits"] for step in (by_torch, by_liger)]
    assert peaks[0] - peaks[1] == pytest.approx(6 * rows * columns, rel=0.02)
