"""Cross-entropy and its gradient equal what transformers computes of the same network and labels."""

import pytest
import torch
from oracles import gradients_of, in_fp64, largest_difference
from transformers.loss.loss_utils import fixed_cross_entropy

from llmtrain.models.build import build
from llmtrain.training.batches import TextSteps
from llmtrain.training.module import Pretraining


def unrounded(logits, labels, **others):
    """`ForCausalLMLoss` without its first line, which rounds the logits to fp32."""
    return fixed_cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-5), ("fp64", 1e-9)])
@pytest.mark.parametrize("micro_batch_tokens", [32, 1_000])
def test_loss_and_gradients_equal_transformers_own(
    shards, pretrain_config, tied, precision, tolerance, micro_batch_tokens
):
    torch.manual_seed(0)
    network = build(pretrain_config.model.model_copy(update={"tie_word_embeddings": tied}))
    if precision == "fp64":
        network = in_fp64(network)
        network.loss_function = unrounded

    step = TextSteps(shards, pretrain_config.trainer, micro_batch_tokens=1_000)[0]
    (whole,) = step.micro_batches
    expected = network(input_ids=whole.ids, labels=whole.ids).loss
    expected.backward()
    theirs = gradients_of(network)
    network.zero_grad()

    infra = pretrain_config.infra.model_copy(update={"loss_chunk_tokens": 7})
    module = Pretraining(network, pretrain_config.trainer, infra, total_tokens=1_000)
    loss = 0.0
    for rows in TextSteps(shards, pretrain_config.trainer, micro_batch_tokens)[0].micro_batches:
        share = module.loss(rows, step.num_units)
        share.backward()
        loss += share.item()
    assert loss == pytest.approx(expected.item(), rel=tolerance / 10)
    assert largest_difference(gradients_of(network), theirs) <= tolerance
