"""Figures that losses are judged by: pure functions of tensors."""

import math

from torch import Tensor


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
