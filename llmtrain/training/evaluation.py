"""Figures on held-out data: language loss, answers' log-probabilities, preference accuracy."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers import PreTrainedModel

from llmtrain.artifacts import SplitCounts
from llmtrain.config.infra import Infra
from llmtrain.config.trainer import DPOTrainer
from llmtrain.data.chats import ChatRows
from llmtrain.data.preferences import PreferencePairs
from llmtrain.data.text import TokenShards
from llmtrain.models import modes
from llmtrain.models.logit_kernels import at_least_fp32
from llmtrain.models.logprobs import hidden_states, token_log_probs
from llmtrain.models.packed import Packed, Tree, document, pack
from llmtrain.training.batches import AnswerLogProbs, packed_pairs, padding
from llmtrain.training.device import autocast
from llmtrain.training.diagnostics import preference_diagnostics
from llmtrain.training.losses import accuracy, bits_per_byte, unigram_loss
from llmtrain.training.preference_losses import (
    Answers,
    Preferences,
    StepFacts,
    kl_baseline,
    kto_loss,
    preference_loss,
)

PACKED_TOGETHER = 1024
"""Pairs that are read and packed at a time when a whole split is scored."""


@torch.no_grad()
def language_loss(
    model: PreTrainedModel, shards: TokenShards, counts: SplitCounts, sequence_tokens: int, infra: Infra
) -> dict[str, float]:
    """`loss` in nats per token and `bits_per_byte` over a whole split, each token but the first predicted once."""
    rows = (document(row) for row in shards.evaluation_rows(sequence_tokens))
    loss, num_targets = _mean_loss(model, rows, infra)
    return {"loss": loss, "bits_per_byte": bits_per_byte(loss, num_targets, counts.num_bytes)}


@torch.no_grad()
def chat_loss(model: PreTrainedModel, chats: ChatRows, infra: Infra) -> dict[str, float]:
    """`loss`: nats per token over the assistant's tokens of a whole split."""
    loss, _ = _mean_loss(
        model, (document(chat.ids, chat.is_target) for chat in map(chats.__getitem__, range(len(chats)))), infra
    )
    return {"loss": loss}


def _mean_loss(model: PreTrainedModel, trees: Iterable[Tree], infra: Infra) -> tuple[float, int]:
    """(nats per target, number of targets), computed in rows of `infra.micro_batch_tokens`."""
    total, num_targets = 0.0, 0
    with evaluating(model, infra):
        for row in _rows(trees, infra.micro_batch_tokens):
            packed = pack(row, **padding(infra)).to(model.device)
            log_probs = target_log_probs(model, packed, infra.loss_chunk_tokens)
            total -= log_probs.double().sum().item()
            num_targets += len(log_probs)
    return total / num_targets, num_targets


def _rows(trees: Iterable[Tree], limit: int) -> Iterator[list[Tree]]:
    """`trees` in order, as many in a row as make at most `limit` tokens, or one."""
    row: list[Tree] = []
    for tree in trees:
        if row and sum(other.num_tokens for other in row) + tree.num_tokens > limit:
            yield row
            row = []
        row.append(tree)
    if row:
        yield row


def target_log_probs(model: PreTrainedModel, packed: Packed, chunk_tokens: int) -> Tensor:
    """[targets] ln p of each target, in at least fp32; without gradients."""
    return token_log_probs(hidden_states(model, packed), model.get_output_embeddings(), packed.targets, chunk_tokens)


def answer_sums(model: PreTrainedModel, packed: Packed, chunk_tokens: int) -> Tensor:
    """[owners] ln p of each answer (or document): the sum over its targets; without gradients."""
    log_probs = target_log_probs(model, packed, chunk_tokens)
    return log_probs.new_zeros(packed.num_owners).index_add(0, packed.owners, log_probs)


def unigram_baseline(
    train: TokenShards, heldout: TokenShards, counts: SplitCounts, vocab_size: int
) -> dict[str, float]:
    """The same two figures for the model that knows only how frequent each training token is."""
    train_counts, heldout_counts = train.token_counts(vocab_size), heldout.token_counts(vocab_size)
    loss = unigram_loss(torch.from_numpy(train_counts), torch.from_numpy(heldout_counts))
    return {"loss": loss, "bits_per_byte": bits_per_byte(loss, counts.num_tokens, counts.num_bytes)}


@torch.no_grad()
def score_pairs(
    model: PreTrainedModel,
    pairs: PreferencePairs,
    indices: list[int],
    infra: Infra,
    progress: Callable[[int], None] = lambda num_tokens: None,
) -> AnswerLogProbs:
    """The answers' log-probabilities of the pairs `indices`, in that order, on the CPU.

    `progress` is called with the tokens done so far.
    """
    scores = torch.empty(len(indices), 2, dtype=at_least_fp32(model.dtype))
    place = {index: position for position, index in enumerate(indices)}
    done = 0
    with evaluating(model, infra):
        for first in range(0, len(indices), PACKED_TOGETHER):
            for micro_batch in packed_pairs(pairs, indices[first : first + PACKED_TOGETHER], infra, reference=None):
                here = micro_batch.indices.tolist()
                sums = answer_sums(model, micro_batch.packed.to(model.device), infra.loss_chunk_tokens)
                scores[[place[index] for index in here]] = sums.cpu().view(-1, 2)
                done += sum(pairs.num_tokens(index) for index in here)
                progress(done)
    return AnswerLogProbs(chosen=scores[:, 0].contiguous(), rejected=scores[:, 1].contiguous())


def judged(
    policy: AnswerLogProbs, reference: AnswerLogProbs, pairs: PreferencePairs, trainer: DPOTrainer
) -> tuple[Answers, Preferences]:
    """The pairs of a split as one step: the policy's answers, and what `trainer.loss` makes of them."""
    members = map(pairs.__getitem__, range(len(pairs)))
    lengths = torch.tensor([[len(pair.chosen_ids), len(pair.rejected_ids)] for pair in members])
    answers = Answers(policy.chosen, policy.rejected, *lengths.unbind(dim=1))
    step = StepFacts(mean_chosen_tokens=lengths[:, 0].double().mean().item(), kl_baseline=None)
    return answers, preference_loss(trainer, answers, reference, step)


def preference_figures(
    policy: AnswerLogProbs, reference: AnswerLogProbs, pairs: PreferencePairs, trainer: DPOTrainer
) -> dict[str, float]:
    """What must be read together: accuracy with its standard error, loss, margin, the chosen answers' own change, and
    `preference_diagnostics`.

    The change is in nats an answer. A policy equal to its reference has accuracy 0.5, DPO's loss ln 2, margin and
    change 0.
    """
    answers, found = judged(policy, reference, pairs, trainer)
    share, standard_error = accuracy(found.margins)
    return {
        "loss": found.losses.mean().item(),
        "accuracy": share,
        "accuracy_se": standard_error,
        "margin": found.margins.mean().item(),
        "chosen_logp_change": (policy.chosen - reference.chosen).mean().item(),
        **preference_diagnostics(answers, reference, found.margins),
    }


def vote_figures(
    policy: AnswerLogProbs, reference: AnswerLogProbs, votes: PreferencePairs, trainer: DPOTrainer
) -> dict[str, float]:
    """The same for KTO's votes: an answer is judged right where its reward, ratio minus baseline, has the vote's sign.

    `margin` is the mean reward of desirable answers minus that of undesirable ones, left out where one kind is missing;
    `chosen_logp_change` is of desirable answers, left out where there is none.
    """
    desirable = torch.tensor([bool(votes.is_desirable(index)) for index in range(len(votes))])
    ratios = policy.chosen - reference.chosen
    baseline = kl_baseline(policy.rejected, reference.rejected)
    weights = trainer.desirable_weight, trainer.undesirable_weight
    rewards = trainer.beta * (ratios - baseline)
    share, standard_error = accuracy(torch.where(desirable, rewards, -rewards))
    found = {
        "loss": kto_loss(ratios, desirable, baseline, trainer.beta, *weights).mean().item(),
        "accuracy": share,
        "accuracy_se": standard_error,
    }
    if desirable.any():
        found["chosen_logp_change"] = ratios[desirable].mean().item()
    if desirable.any() and not desirable.all():
        found["margin"] = (rewards[desirable].mean() - rewards[~desirable].mean()).item()
    return found


@contextmanager
def evaluating(model: PreTrainedModel, infra: Infra) -> Iterator[None]:
    """Dropout off and the infra's precision; each module's mode is put back afterwards."""
    with modes.evaluating(model), autocast(infra):
        yield
