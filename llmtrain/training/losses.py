"""Losses and preference figures: pure functions of tensors."""

import math
from dataclasses import dataclass

from torch import Tensor
from torch.nn.functional import logsigmoid


def cross_entropy(log_probs: Tensor, num_targets: int) -> Tensor:
    """Mean negative log-likelihood, in nats: -sum(log_probs) / num_targets.

    `num_targets` counts the targets of the whole global batch, so that the losses of its micro-batches add up to its
    own whatever the split.
    """
    return -log_probs.sum() / num_targets


@dataclass(frozen=True)
class Preferences:
    """What DPO computes of n pairs; each tensor is [n], in nats and in the precision of its log-probabilities."""

    losses: Tensor
    margins: Tensor
    """beta * ((chosen - reference chosen) - (rejected - reference rejected)): the implicit reward's difference."""
    chosen_changes: Tensor
    """chosen - reference chosen: below zero, the policy finds even the preferred answers less likely than before."""


def dpo_sigmoid(
    chosen: Tensor, rejected: Tensor, reference_chosen: Tensor, reference_rejected: Tensor, beta: float
) -> Preferences:
    """DPO's sigmoid loss (arXiv 2305.18290, equation 7) of n pairs.

    The arguments are [n]: the log-probability of each whole answer given its prompt, under the policy and under the
    reference. The loss is -ln sigmoid(margin); ln 2 where policy and reference agree.
    """
    chosen_changes = chosen - reference_chosen
    margins = beta * (chosen_changes - (rejected - reference_rejected))
    return Preferences(losses=-logsigmoid(margins), margins=margins, chosen_changes=chosen_changes)


def accuracy(scores: Tensor) -> tuple[float, float]:
    """(share of scores above zero, its standard error sqrt(p (1 - p) / n)); a score of zero counts as half right.

    `scores` [n] are margins, or any difference that should be positive.
    """
    right = (scores > 0).double() + 0.5 * (scores == 0).double()
    share = right.mean().item()
    return share, (share * (1 - share) / len(scores)) ** 0.5


def unigram_loss(train_counts: Tensor, heldout_counts: Tensor) -> float:
    """Cross-entropy, in nats per token, of held-out tokens under the training tokens' frequencies.

    Both [vocabulary]. One is added to each training count (Laplace), so that an unseen token costs a finite amount.
    """
    log_frequencies = (train_counts.double() + 1).log() - (train_counts.double() + 1).sum().log()
    return -(heldout_counts.double() @ log_frequencies).item() / heldout_counts.sum().item()


def bits_per_byte(loss_nats_per_token: float, num_tokens: int, num_bytes: int) -> float:
    """A loss per token as bits per byte of text: comparable between tokenizers."""
    return loss_nats_per_token * num_tokens / num_bytes / math.log(2)
