"""What each rank holds, by hand from one rank's parts."""

import pytest
import torch

from llmtrain.plan.make import CODE_BYTES
from llmtrain.plan.memory import bytes_between_ranks, per_rank
from llmtrain.plan.trace import shapes_of_products
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


def test_a_logit_takes_six_bytes_in_bf16_by_torch_and_two_by_liger(planner_of: PlannerOf):
    """The product in bf16, which becomes its gradient; torch's operators work on a copy in fp32."""
    sizes = ("infra=h100", "infra.precision=bf16", "trainer.batch_rows=128", "infra.micro_batch_tokens=4096")
    sizes += ("model.vocab_size=8192",)  # logits are nearly all of it
    by_torch = planner_of(*TOY, *sizes, "infra.loss_kernel=torch").step
    by_liger = planner_of(*TOY, *sizes, "infra.loss_kernel=liger").step
    rows, columns = by_torch.row.num_targets, 8192
    assert rows == 4096
    six, two = (step.first.peaks["head"]["logits"] / (rows * columns) for step in (by_torch, by_liger))
    assert (six, two) == (pytest.approx(6, abs=0.25), pytest.approx(2, abs=0.25))


def test_code_for_the_products_in_bf16_is_counted_on_a_cpu_by_shape_and_length_of_row(planner_of: PlannerOf):
    """Of a block: queries and output, keys and values, gate and up, down; of each a product forwards and two backwards,
    keys' and values' alike; and three of the head."""
    bf16 = planner_of(*TOY, "infra.precision=bf16")
    (length,) = {row.num_tokens for step in bf16.workload.steps for row in step}
    assert length == 4 * 32
    shapes = shapes_of_products(bf16.step.first, torch.bfloat16)
    assert bf16.code_bytes == len(shapes) * CODE_BYTES
    assert len(shapes) == 15
    assert planner_of(*TOY).code_bytes == planner_of(*TOY, "infra=h100", "infra.precision=bf16").code_bytes == 0
    assert bf16.plan().process_bytes >= 500_000_000 + 15 * CODE_BYTES
