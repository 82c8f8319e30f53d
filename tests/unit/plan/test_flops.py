"""FLOPs by hand, by torch's counter, and those that others published."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from llmtrain.config.compose import load_config
from llmtrain.models import attention
from llmtrain.models.build import build
from llmtrain.models.head import loss_of_tokens
from llmtrain.models.logprobs import hidden_states
from llmtrain.models.packed import document, pack
from llmtrain.plan.flops import flops
from llmtrain.plan.workload import Row, estimated, row_of
from tests.unit.plan.conftest import TOY, PlannerOf

# qwen3_tiny: 2 layers, width 64, 4 query and 2 key heads of 16, feed-forward 160, 512 entries
ATTENTION_MATRICES = 64 * 64 + 2 * 64 * 32 + 64 * 64
FEED_FORWARD = 3 * 64 * 160
LINEAR = 2 * (ATTENTION_MATRICES + FEED_FORWARD)
HEAD = 64 * 512


def test_a_two_layer_toy_by_hand(planner_of: PlannerOf):
    planner = planner_of(*TOY)
    assert (planner.step.linear_weights, planner.step.head_weights) == (LINEAR, HEAD) == (86016, 32768)
    (row,) = planner.workload.steps[0]
    assert (row.num_tokens, row.num_targets, row.full_seen, row.half_seen) == (4 * 32, 4 * 32, 4 * 32 * 32, 4 * 512)
    found = flops([row], planner.step, "full", "none")
    # each pair of tokens costs two products of 16 in each of 4 heads and 2 layers
    assert found.forward == 2 * LINEAR * 128 + 2 * HEAD * 128 + 2 * 2 * (2 * 4 * 16) * 4096
    assert found.backward == 2 * found.forward
    half = flops([row], planner.step, "half", "full")
    assert found.forward - half.forward == 2 * 2 * 128 * 4096 / 2
    assert half.recomputed == half.forward - 2 * HEAD * 128  # the output layer is outside the blocks


def test_frozen_matrices_need_no_gradient(planner_of: PlannerOf):
    step = planner_of(*TOY, "adapter=lora", "adapter.rank=2").step
    assert step.frozen_linear_weights == LINEAR
    updates = 2 * (2 * (64 + 64) + 2 * (64 + 32)) + 2 * (
        2 * (64 + 160) + (160 + 64)
    )  # of q o, k v; of the feed-forward
    assert step.num_trained == step.linear_weights - LINEAR == 2 * updates
    row = Row(((10, 0),), (9,))
    found = flops([row], step, "full", "none")
    attention = 4 * 128 * 100
    assert found.backward == 2 * LINEAR * 10 + 4 * (2 * updates) * 10 + 2 * attention + 2 * HEAD * 9


@pytest.mark.parametrize(("tokens", "published"), [(1024, 3.93e9), (2048, 4.28e9), (4096, 4.99e9)])
def test_qwen3_0_6b_as_published(planner_of: PlannerOf, tokens: int, published: float):
    step = planner_of("model=qwen3_0_6b", "infra=h100", "infra.micro_batch_tokens=1024").step
    row = Row(((tokens, 0),), (tokens,))
    assert flops([row], step, "half", "none").of_model / tokens == pytest.approx(published, rel=2e-3)


def test_torch_counts_the_same_on_a_real_step(planner_of: PlannerOf):
    """All but the scores that attention computes anew in its backward pass: those are no model FLOPs."""
    planner = planner_of(*TOY)
    model = build(planner.config.model)
    attention.use(model, "segments")
    packed = pack([document(torch.arange(33).numpy()) for _ in range(4)])
    with FlopCounterMode(display=False) as counter:
        hidden = hidden_states(model, packed)
        loss_of_tokens(hidden, model.get_output_embeddings().weight, packed.targets, 1.0, 1024).backward()
    row = row_of(packed)
    assert row == planner.workload.largest
    scores = 2 * 128 * row.full_seen
    assert flops([row], planner.step, "full", "none").of_model + scores == counter.get_total_flops()
    assert planner.step.more.num_flops() == counter.get_total_flops()


def test_the_sizes_of_a_workload(planner_of: PlannerOf):
    whole = estimated(load_config([*TOY, "infra.micro_batch_tokens=64", "trainer.budget_tokens=1000000"]))
    assert [row.num_tokens for row in whole.steps[0]] == [64, 64]
    assert (whole.num_steps, whole.num_tokens) == (1000000 // 128, 1000000 // 128 * 128)
    shared = estimated(load_config([*TOY, "infra.micro_batch_tokens=64", "infra.ranks=2"]))
    assert [row.num_tokens for row in shared.steps[0]] == [64]
    pairs = estimated(load_config(["trainer=dpo", "trainer.sequence_tokens=90", "trainer.batch_rows=2"]))
    assert pairs.steps[0][0].segments == ((89, 0), (29, 60)) * 2  # two thirds are prompt, as data.pairs says
    assert pairs.steps[0][0].half_seen == 2 * (89 * 89 / 2 + 29 * 29 / 2 + 29 * 60)
    assert [row.segments for row in pairs.cut(120).steps[0]] == [((89, 0), (29, 60))] * 2
