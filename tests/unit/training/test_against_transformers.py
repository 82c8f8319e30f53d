"""Losses and gradients equal what plain transformers computes of each sequence alone, unpacked."""

import copy

import numpy as np
import pytest
import torch
from oracles import gradients_of, in_fp64, largest_difference, whole_loss
from torch import Tensor
from transformers import PreTrainedModel
from transformers.loss.loss_utils import fixed_cross_entropy

from llmtrain.models.attention import use
from llmtrain.models.build import build
from llmtrain.training import preference_losses
from llmtrain.training.batches import ChatSteps, PairSteps, StepBatch, TextSteps, packed_documents
from llmtrain.training.evaluation import score_pairs
from llmtrain.training.module import CrossEntropy, DirectPreference

IGNORED = -100
PRECISIONS = [("fp32", 1e-5), ("fp64", 1e-9)]
KERNELS = ["segments", "sdpa"]
CUTS = {"micro_batch_tokens": 40, "loss_chunk_tokens": 7}


def unrounded(logits, labels, num_items_in_batch=None, **others):
    """`ForCausalLMLoss` without its first line, which rounds the logits to fp32."""
    return fixed_cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), num_items_in_batch)


def two(config, precision: str, kernel: str, tied: bool = True) -> tuple[PreTrainedModel, PreTrainedModel]:
    """The same network twice: one for us, one that runs as transformers has it."""
    torch.manual_seed(0)
    network = build(config.model.model_copy(update={"tie_word_embeddings": tied}))
    if precision == "fp64":
        network = in_fp64(network)
        network.loss_function = unrounded
    theirs = copy.deepcopy(network)
    use(network, kernel)
    return network, theirs


def transformers_loss(network: PreTrainedModel, sequences: list[tuple[Tensor, Tensor]]) -> float:
    """The mean over all labels, from one forward pass for each (ids, labels); its gradients are left in `network`."""
    number = sum(int((labels[1:] != IGNORED).sum()) for _, labels in sequences)
    total = 0.0
    for ids, labels in sequences:
        loss = network(input_ids=ids[None], labels=labels[None], num_items_in_batch=number).loss
        loss.backward()
        total += loss.item()
    return total


def assert_equal(module, step: StepBatch, theirs: PreTrainedModel, expected: float, tolerance: float) -> None:
    assert len(step.micro_batches) > 1
    assert whole_loss(module, step) == pytest.approx(expected, rel=tolerance / 10)
    assert largest_difference(gradients_of(module.model), gradients_of(theirs)) <= tolerance


@pytest.mark.parametrize(
    ("packing", "tied", "kernel"),
    [
        ("stream", True, "segments"),
        ("stream", False, "sdpa"),
        ("documents", True, "segments"),
        ("documents", True, "sdpa"),
        ("documents", False, "segments"),
    ],
)
@pytest.mark.parametrize(("precision", "tolerance"), PRECISIONS)
def test_pretraining(shards, pretrain_config, tied, kernel, precision, tolerance, packing):
    network, theirs = two(pretrain_config, precision, kernel, tied)
    infra, trainer = pretrain_config.infra.model_copy(update=CUTS), pretrain_config.trainer
    if packing == "documents":  # all rows in one step
        trainer = trainer.model_copy(update={"sequence_tokens": 30, "batch_rows": 9})
    steps = TextSteps(shards, trainer, trainer.budget_tokens, packing, infra)
    step = steps[0]
    indices = [index for micro in step.micro_batches for index in micro.indices.tolist()]
    if packing == "stream":
        sequences = [shards.row(index, 16) for index in indices]
    else:
        rows = packed_documents(shards, 30)
        sequences = [shards.tokens(start, stop) for index in indices for start, stop in rows[index]]
        assert any(len(rows[index]) > 1 for index in indices), "no row holds two documents"
    ids = [torch.from_numpy(sequence) for sequence in sequences]
    expected = transformers_loss(theirs, [(each, each) for each in ids])
    assert_equal(CrossEntropy(network, trainer, infra, total_tokens=1_000), step, theirs, expected, tolerance)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(("precision", "tolerance"), PRECISIONS)
def test_chats(chats, sft_config, kernel, precision, tolerance):
    network, theirs = two(sft_config, precision, kernel)
    infra, trainer = sft_config.infra.model_copy(update=CUTS), sft_config.trainer
    steps = ChatSteps(chats, trainer, infra)
    step = steps[0]
    members = [
        chats[chat] for micro in step.micro_batches for row in micro.indices.tolist() for chat in steps.rows[row]
    ]
    assert len(members) > trainer.batch_rows, "no row holds two chats"
    sequences = [
        (torch.from_numpy(chat.ids), torch.from_numpy(np.where(chat.is_target, chat.ids, IGNORED))) for chat in members
    ]
    expected = transformers_loss(theirs, sequences)
    assert_equal(CrossEntropy(network, trainer, infra, total_tokens=1_000), step, theirs, expected, tolerance)


def answer_log_prob(network: PreTrainedModel, prompt: np.ndarray, answer: np.ndarray) -> Tensor:
    """From one plain forward pass over prompt and answer."""
    ids = torch.from_numpy(np.concatenate([prompt, answer]))
    log_probs = network(input_ids=ids[None]).logits[0, :-1].log_softmax(1).gather(1, ids[1:, None])
    return log_probs[len(prompt) - 1 :].sum()


@pytest.mark.parametrize("loss", ["sigmoid", "simpo", "orpo"])  # the last two are reference-free: TRL's are elsewhere
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(("precision", "tolerance"), PRECISIONS)
def test_pairs_whose_prompt_is_shared_against_two_sequences_each(pairs, dpo_config, loss, kernel, precision, tolerance):
    """Each answer after its own copy of the prompt, in a row of its own, through transformers' own attention."""
    network, theirs = two(dpo_config, precision, kernel)
    _, earlier = two(dpo_config, precision, kernel)
    with torch.no_grad():
        for parameter in earlier.parameters():
            parameter.mul_(1.1)
    infra, trainer = dpo_config.infra.model_copy(update=CUTS), dpo_config.trainer.model_copy(update={"loss": loss})
    reference = score_pairs(earlier, pairs, list(range(len(pairs))), infra)
    step = PairSteps(pairs, reference, trainer, infra)[0]
    indices = [index for micro in step.micro_batches for index in micro.indices.tolist()]
    members = [pairs[index] for index in indices]
    sides = [
        torch.stack([answer_log_prob(theirs, pair.prompt_ids, getattr(pair, side)) for pair in members])
        for side in ("chosen_ids", "rejected_ids")
    ]
    lengths = [torch.tensor([len(getattr(pair, f"{side}_ids")) for pair in members]) for side in ("chosen", "rejected")]
    beta = trainer.beta
    match loss:
        case "sigmoid":
            before = reference.chosen[indices] - reference.rejected[indices]
            losses = -torch.nn.functional.logsigmoid(beta * (sides[0] - sides[1] - before))
        case "simpo":
            means = [side / length for side, length in zip(sides, lengths, strict=True)]
            losses = -torch.nn.functional.logsigmoid(beta * (means[0] - means[1] - trainer.target_margin))
        case _:
            means = [side / length for side, length in zip(sides, lengths, strict=True)]
            log_odds = [mean - torch.log1p(-mean.exp()) for mean in means]
            losses = -torch.nn.functional.logsigmoid(log_odds[0] - log_odds[1]) * beta
            losses = losses - sides[0] / (lengths[0].sum() / len(members))
    losses.mean().backward()
    module = DirectPreference(network, trainer, infra, total_tokens=1_000)
    assert {"simpo", "orpo"} == preference_losses.REFERENCE_FREE
    assert_equal(module, step, theirs, losses.mean().item(), tolerance)
