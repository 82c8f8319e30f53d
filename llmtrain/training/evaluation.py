"""Figures on held-out data: language loss, answers' log-probabilities, preference accuracy."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from llmtrain.artifacts import SplitCounts
from llmtrain.config.infra import Infra
from llmtrain.data.preferences import PreferencePairs
from llmtrain.data.text import TokenShards
from llmtrain.models.logprobs import at_least_fp32, hidden_states, token_log_probs
from llmtrain.training.batches import AnswerLogProbs, PairRows, longest_first, pair_rows
from llmtrain.training.device import autocast
from llmtrain.training.losses import accuracy, bits_per_byte, dpo_sigmoid, unigram_loss


@torch.no_grad()
def language_loss(
    model: PreTrainedModel, shards: TokenShards, counts: SplitCounts, sequence_tokens: int, infra: Infra
) -> dict[str, float]:
    """`loss` in nats per token and `bits_per_byte` over a whole split, each token but the first predicted once."""
    total, num_targets = 0.0, 0
    rows_at_once = max(1, infra.micro_batch_tokens // sequence_tokens)
    waiting: list[np.ndarray] = []
    with evaluating(model, infra):
        for row in [*shards.evaluation_rows(sequence_tokens), None]:
            if waiting and (row is None or len(row) != len(waiting[0]) or len(waiting) == rows_at_once):
                ids = torch.from_numpy(np.stack(waiting)).to(model.device)
                hidden, output = hidden_states(model, ids[:, :-1]).flatten(0, 1), model.get_output_embeddings()
                log_probs = token_log_probs(hidden, output, ids[:, 1:].flatten(), infra.loss_chunk_tokens)
                total -= log_probs.double().sum().item()
                num_targets += len(log_probs)
                waiting = []
            if row is not None:
                waiting.append(row)
    loss = total / num_targets
    return {"loss": loss, "bits_per_byte": bits_per_byte(loss, num_targets, counts.num_bytes)}


def unigram_baseline(
    train: TokenShards, heldout: TokenShards, counts: SplitCounts, vocab_size: int
) -> dict[str, float]:
    """The same two figures for the model that knows only how frequent each training token is."""
    train_counts, heldout_counts = train.token_counts(vocab_size), heldout.token_counts(vocab_size)
    loss = unigram_loss(torch.from_numpy(train_counts), torch.from_numpy(heldout_counts))
    return {"loss": loss, "bits_per_byte": bits_per_byte(loss, counts.num_tokens, counts.num_bytes)}


def answer_log_probs(model: PreTrainedModel, rows: PairRows, chunk_tokens: int) -> Tensor:
    """ln p(answer | prompt), summed over the answer's tokens: [2n] as `token_log_probs`, chosen first.

    Only the hidden states that predict an answer's token reach the output layer.
    """
    hidden = hidden_states(model, rows.ids)[:, :-1]
    log_probs = token_log_probs(
        hidden[rows.is_answer], model.get_output_embeddings(), rows.ids[:, 1:][rows.is_answer], chunk_tokens
    )
    row_of_token = rows.is_answer.nonzero()[:, 0]
    return log_probs.new_zeros(len(rows.ids)).index_add(0, row_of_token, log_probs)


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
    order = longest_first(pairs, indices)
    scores = torch.empty(2, len(indices), dtype=at_least_fp32(model.dtype))
    place = {index: position for position, index in enumerate(indices)}
    done = 0
    with evaluating(model, infra):
        for rows in pair_rows(pairs, indices, infra.micro_batch_tokens, reference=None):
            rows = PairRows(rows.ids.to(model.device), rows.is_answer.to(model.device), rows.reference)
            found = answer_log_probs(model, rows, infra.loss_chunk_tokens).cpu().view(2, -1)
            here = order[done : done + found.shape[1]]
            scores[:, [place[index] for index in here]] = found
            done += len(here)
            progress(sum(pairs.num_tokens(index) for index in order[:done]))
    return AnswerLogProbs(chosen=scores[0], rejected=scores[1])


def preference_figures(policy: AnswerLogProbs, reference: AnswerLogProbs, beta: float) -> dict[str, float]:
    """What must be read together: accuracy with its standard error, loss, margin, and the chosen answers' own change.

    The change is in nats an answer. A policy equal to its reference has accuracy 0.5, loss ln 2, margin and change 0.
    """
    found = dpo_sigmoid(policy.chosen, policy.rejected, reference.chosen, reference.rejected, beta)
    share, standard_error = accuracy(found.margins)
    return {
        "loss": found.losses.mean().item(),
        "accuracy": share,
        "accuracy_se": standard_error,
        "margin": found.margins.mean().item(),
        "chosen_logp_change": found.chosen_changes.mean().item(),
    }


@contextmanager
def evaluating(model: PreTrainedModel, infra: Infra) -> Iterator[None]:
    """Dropout off and the infra's precision; the model's mode is put back afterwards."""
    training = model.training
    model.eval()
    try:
        with autocast(infra):
            yield
    finally:
        model.train(training)
