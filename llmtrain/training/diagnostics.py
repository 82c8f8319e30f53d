"""What tells a preference run that learns from one that only looks so: figures on held-out pairs, and warnings.

A margin that rises can hide three things: both answers become unlikely, the chosen one only less so; the policy has
learnt to prefer long answers; it has left its reference far behind.
"""

import torch
from torch import Tensor

from llmtrain.training.losses import accuracy
from llmtrain.training.preference_losses import Answers, LogProbs

COLLAPSE_NATS_PER_TOKEN = -0.1
"""A chosen token that has become a tenth less likely, on average."""
LENGTH_CORRELATION = 0.5
"""A quarter of the margins' variance goes with the difference in length."""
LENGTH_ACCURACY_GAP = 0.1
"""Accuracy where the longer answer is chosen minus accuracy where the shorter one is."""
KL_NATS_PER_TOKEN = 0.1
"""k3 of answers whose tokens have become about a factor of 1.6 more, or less, likely."""


def preference_diagnostics(policy: Answers, reference: LogProbs, margins: Tensor) -> dict[str, float]:
    """Figures of n held-out pairs; `margins` [n] as `preference_loss` gives them.

    `chosen_logp_change_per_token`, `rejected_...`: change from the reference over all tokens of those answers, in nats.
    `margin_length_correlation`: Pearson's, of margin and chosen minus rejected tokens; 0 where one of them is constant.
    `accuracy_longer_chosen`, `accuracy_shorter_chosen`, each where there are such pairs, and where both are,
    `accuracy_length_gap` with its standard error `accuracy_length_gap_se`.
    `kl_k1`, `kl_k3`: `kl_estimates` over all answers.
    """
    chosen_changes, rejected_changes = policy.chosen - reference.chosen, policy.rejected - reference.rejected
    extra_tokens = policy.chosen_tokens - policy.rejected_tokens
    k1, k3 = kl_estimates(
        torch.cat([chosen_changes, rejected_changes]), torch.cat([policy.chosen_tokens, policy.rejected_tokens])
    )
    figures = {
        "chosen_logp_change_per_token": (chosen_changes.sum() / policy.chosen_tokens.sum()).item(),
        "rejected_logp_change_per_token": (rejected_changes.sum() / policy.rejected_tokens.sum()).item(),
        "margin_length_correlation": correlation(margins, extra_tokens),
        "kl_k1": k1,
        "kl_k3": k3,
    }
    longer, shorter = margins[extra_tokens > 0], margins[extra_tokens < 0]
    if len(longer):
        figures["accuracy_longer_chosen"] = accuracy(longer)[0]
    if len(shorter):
        figures["accuracy_shorter_chosen"] = accuracy(shorter)[0]
    if len(longer) and len(shorter):
        (share_longer, error_longer), (share_shorter, error_shorter) = accuracy(longer), accuracy(shorter)
        figures["accuracy_length_gap"] = share_longer - share_shorter
        figures["accuracy_length_gap_se"] = (error_longer**2 + error_shorter**2) ** 0.5
    return figures


def correlation(x: Tensor, y: Tensor) -> float:
    """Pearson's correlation of two [n]; 0 where one of them is constant."""
    x, y = x.double() - x.double().mean(), y.double() - y.double().mean()
    scale = (x.norm() * y.norm()).item()
    return (x @ y).item() / scale if scale else 0.0


def kl_estimates(ratios: Tensor, num_tokens: Tensor) -> tuple[float, float]:
    """KL(policy || reference) in nats per token from n answers: (k1, k3) of http://joschu.net/blog/kl-approx.html.

    `ratios` [n] are ln p(answer) under the policy minus the same under the reference. With r an answer's ratio per
    token, k1 is the mean of r, and k3 that of e^-r - 1 + r, which is never negative; answers count by their tokens.
    Estimates of the KL only for answers that the policy wrote: of a data set's answers they say how far the policy has
    moved on these (k1 below zero: it finds them less likely). Within an answer k3 is a lower bound (Jensen), because
    only its mean ratio is known.
    """
    weights = num_tokens.double() / num_tokens.sum()
    r = ratios.double() / num_tokens.clamp(min=1)
    return (weights @ r).item(), (weights @ (torch.expm1(-r) + r)).item()


def warnings_of(figures: dict[str, float]) -> list[str]:
    """What the figures of `preference_diagnostics`, and the `margin`, warn of, each with the overrides that help."""
    found = []
    change = figures["chosen_logp_change_per_token"]
    if change < COLLAPSE_NATS_PER_TOKEN and figures["margin"] > 0:
        found.append(
            f"the chosen answers are collapsing: {change:+.2f} nats a token, while the margin rose to "
            f"{figures['margin']:.2f} because the rejected ones fall faster; add trainer.sft_weight=0.2, or use "
            f"trainer.loss=apo_zero, or lower trainer.lr"
        )
    gap, gap_error = figures.get("accuracy_length_gap", 0.0), figures.get("accuracy_length_gap_se", 0.0)
    if gap > max(LENGTH_ACCURACY_GAP, 2 * gap_error) and figures["margin_length_correlation"] > LENGTH_CORRELATION:
        found.append(
            f"the policy prefers long answers: accuracy {figures['accuracy_longer_chosen']:.0%} where the longer one "
            f"is chosen and {figures['accuracy_shorter_chosen']:.0%} where the shorter one is, correlation of margin "
            f"and length {figures['margin_length_correlation']:.2f}; balance the lengths "
            f"of the data, or compare means per token, as trainer.loss=ipo and trainer.loss=simpo do"
        )
    if figures["kl_k3"] > KL_NATS_PER_TOKEN:
        found.append(
            f"the policy is far from its reference on the held-out answers: {figures['kl_k3']:.2f} nats a token; raise "
            f"trainer.beta, or lower trainer.lr or trainer.epochs"
        )
    return found
