"""The DPO family: what each loss computes of answers' log-probabilities, as pure functions of tensors.

Every tensor is [n], one entry a pair (or an answer, for KTO), in nats, and keeps its precision. A ratio is
ln p(answer | prompt) under the policy minus the same under the reference; a mean is a log-probability divided by the
answer's tokens. `preference_loss` is the one door: a loss there is a sum over pairs, so that the losses of a step's
micro-batches add up to its own whatever the split.

Equal to TRL 1.16 (value and gradient, tests/unit/training/test_preference_losses_against_trl.py) but for two points:
its DPOTrainer has no label smoothing for `sigmoid` (ours is that of its CPOTrainer), and its ORPOTrainer trains on the
prompt's tokens too (ours on the chosen answer's only, as the paper does).
"""

from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

LossName = Literal["sigmoid", "ipo", "hinge", "robust", "simpo", "orpo", "kto", "apo_zero", "apo_down"]

REFERENCE_FREE: frozenset[LossName] = frozenset({"simpo", "orpo"})
"""Losses that need no reference."""


class PreferenceSettings(Protocol):
    """What a trainer's config says about its preference loss."""

    @property
    def loss(self) -> LossName: ...
    @property
    def beta(self) -> float: ...
    @property
    def label_smoothing(self) -> float: ...
    @property
    def sft_weight(self) -> float: ...
    @property
    def target_margin(self) -> float: ...
    @property
    def desirable_weight(self) -> float: ...
    @property
    def undesirable_weight(self) -> float: ...


class LogProbs(Protocol):
    """ln p(answer | prompt), summed over the answer's tokens, of the two answers of n pairs; [n] each."""

    @property
    def chosen(self) -> Tensor: ...
    @property
    def rejected(self) -> Tensor: ...


@dataclass(frozen=True)
class Answers:
    """The two answers of n pairs under one model; each tensor is [n]."""

    chosen: Tensor
    """ln p(answer | prompt), summed over the answer's tokens"""
    rejected: Tensor
    chosen_tokens: Tensor
    """the tokens that `chosen` sums over"""
    rejected_tokens: Tensor


@dataclass(frozen=True)
class StepFacts:
    """What a pair's loss needs to know of its whole step, over all micro-batches and ranks."""

    mean_chosen_tokens: float
    """Tokens of a chosen answer, on average: the SFT term is divided by it."""
    kl_baseline: Tensor | None
    """KTO's, from `kl_baseline`; null for the other losses"""


@dataclass(frozen=True)
class Preferences:
    """What DPO computes of n pairs; each tensor is [n], in nats and in the precision of its log-probabilities."""

    losses: Tensor
    margins: Tensor
    """beta * ((chosen - reference chosen) - (rejected - reference rejected)): the implicit reward's difference."""
    chosen_changes: Tensor
    """chosen - reference chosen: below zero, the policy finds even the preferred answers less likely than before."""


def preference_loss(
    settings: PreferenceSettings, policy: Answers, reference: LogProbs | None, step: StepFacts
) -> Preferences:
    """The loss, margin and chosen answer's change of each of n pairs, by `settings.loss`.

    The caller sums the losses and divides by the step's pairs. `reference` may be null for the losses of
    `REFERENCE_FREE`; `chosen_changes` are then the chosen answers' log-probabilities themselves. `margins` are
    differences of implicit rewards: beta times the difference of ratios; of means for `simpo` and `orpo`.

    `settings.sft_weight` times the chosen answers' negative log-likelihood is added (arXiv 2404.19733, equation 1): the
    mean over all chosen tokens of the step, as TRL's, where the paper has the mean over answers of each one's mean.
    """
    assert reference is not None or settings.loss in REFERENCE_FREE, f"{settings.loss} needs a reference"
    chosen_ratios = policy.chosen if reference is None else policy.chosen - reference.chosen
    rejected_ratios = policy.rejected if reference is None else policy.rejected - reference.rejected
    chosen_tokens, rejected_tokens = policy.chosen_tokens.clamp(min=1), policy.rejected_tokens.clamp(min=1)
    beta, smoothing, advantages = settings.beta, settings.label_smoothing, chosen_ratios - rejected_ratios
    negative_log_likelihoods = -policy.chosen / step.mean_chosen_tokens
    margins = beta * advantages

    match settings.loss:
        case "sigmoid":
            losses = sigmoid_loss(advantages, beta, smoothing)
        case "ipo":
            losses = ipo_loss(chosen_ratios / chosen_tokens, rejected_ratios / rejected_tokens, beta)
        case "hinge":
            losses = hinge_loss(advantages, beta)
        case "robust":
            losses = robust_loss(advantages, beta, smoothing)
        case "apo_zero":
            losses = apo_zero_loss(chosen_ratios, rejected_ratios, beta)
        case "apo_down":
            losses = apo_down_loss(chosen_ratios, rejected_ratios, beta)
        case "kto":  # a pair is a desirable and an undesirable answer; TRL's mean is over answers
            weights = (settings.desirable_weight, settings.undesirable_weight)
            assert step.kl_baseline is not None, "kto needs the step's KL baseline"
            desirable = kto_loss(chosen_ratios, torch.ones_like(chosen_tokens).bool(), step.kl_baseline, beta, *weights)
            undesirable = kto_loss(
                rejected_ratios, torch.zeros_like(rejected_tokens).bool(), step.kl_baseline, beta, *weights
            )
            losses = (desirable + undesirable) / 2
        case "simpo":
            chosen_means, rejected_means = policy.chosen / chosen_tokens, policy.rejected / rejected_tokens
            losses = simpo_loss(chosen_means, rejected_means, beta, settings.target_margin)
            margins = beta * (chosen_means - rejected_means)
        case "orpo":
            chosen_means, rejected_means = policy.chosen / chosen_tokens, policy.rejected / rejected_tokens
            losses = negative_log_likelihoods + beta * odds_ratio_loss(chosen_means, rejected_means)
            margins = beta * (chosen_means - rejected_means)
    if settings.sft_weight:
        losses = losses + settings.sft_weight * negative_log_likelihoods
    return Preferences(losses=losses, margins=margins, chosen_changes=chosen_ratios)


def sigmoid_loss(advantages: Tensor, beta: float, label_smoothing: float) -> Tensor:
    """DPO (arXiv 2305.18290, equation 7): -ln sigmoid(beta * advantage); ln 2 where policy and reference agree.

    `advantages` are chosen minus rejected ratios. `label_smoothing` e is the chance that a label is wrong: the loss is
    (1 - e) times that of the pair plus e times that of the pair turned round (conservative DPO, equation 3 of
    https://ericmitchell.ai/cdpo.pdf).
    """
    margins = beta * advantages
    return -(1 - label_smoothing) * logsigmoid(margins) - label_smoothing * logsigmoid(-margins)


def robust_loss(advantages: Tensor, beta: float, label_smoothing: float) -> Tensor:
    """Robust DPO (arXiv 2403.00409, equation 12): unbiased where a share `label_smoothing` < 0.5 of labels is wrong.

    [(1 - e) * loss - e * loss of the pair turned round] / (1 - 2 e): it may be negative.
    """
    margins = beta * advantages
    kept, turned = -(1 - label_smoothing) * logsigmoid(margins), -label_smoothing * logsigmoid(-margins)
    return (kept - turned) / (1 - 2 * label_smoothing)


def hinge_loss(advantages: Tensor, beta: float) -> Tensor:
    """The hinge on DPO's margin: max(0, 1 - beta * advantage) (SLiC, arXiv 2305.10425, equation 1, on ratios as in RSO,
    arXiv 2309.06657, equation 5)."""
    return torch.relu(1 - beta * advantages)


def ipo_loss(chosen_mean_ratios: Tensor, rejected_mean_ratios: Tensor, beta: float) -> Tensor:
    """IPO (arXiv 2310.12036, equation 17): (advantage - 1 / (2 beta))^2, beta being the paper's tau.

    Ratios are per token, which the paper does not say; TRL has it from its authors. TRL also counts an answer's first
    token where the prompt is empty, though nothing predicts it.
    """
    return (chosen_mean_ratios - rejected_mean_ratios - 1 / (2 * beta)) ** 2


def apo_zero_loss(chosen_ratios: Tensor, rejected_ratios: Tensor, beta: float) -> Tensor:
    """APO-zero (arXiv 2408.06266, equation 7): for chosen answers that are better than the model's own.

    sigmoid(-beta * chosen ratio) + sigmoid(beta * rejected ratio): the chosen rise and the rejected fall.
    """
    return torch.sigmoid(-beta * chosen_ratios) + torch.sigmoid(beta * rejected_ratios)


def apo_down_loss(chosen_ratios: Tensor, rejected_ratios: Tensor, beta: float) -> Tensor:
    """APO-down (arXiv 2408.06266, equation 8): for chosen answers that are worse than the model's own.

    sigmoid(beta * chosen ratio) + sigmoid(-beta * advantage): the chosen fall, and the rejected fall further.
    """
    return torch.sigmoid(beta * chosen_ratios) + torch.sigmoid(-beta * (chosen_ratios - rejected_ratios))


def simpo_loss(chosen_means: Tensor, rejected_means: Tensor, beta: float, target_margin: float) -> Tensor:
    """SimPO (arXiv 2405.14734, equation 6): -ln sigmoid(beta * (chosen mean - rejected mean - target_margin)).

    Without a reference. `target_margin`, in nats a token, is the paper's gamma over beta (TRL's simpo_gamma over beta).
    """
    return -logsigmoid(beta * (chosen_means - rejected_means - target_margin))


def odds_ratio_loss(chosen_means: Tensor, rejected_means: Tensor) -> Tensor:
    """ORPO's odds ratio term (arXiv 2403.07691, equation 7): -ln sigmoid(ln(odds of chosen / odds of rejected)).

    odds = p / (1 - p), p being the geometric mean of an answer's token probabilities. ORPO's loss (equation 6) is the
    chosen answer's negative log-likelihood plus beta (the paper's lambda) times this. A mean of 0, where the odds are
    infinite, is taken for the next number below; TRL's gradient is NaN there.
    """
    return -logsigmoid(_log_odds(chosen_means) - _log_odds(rejected_means))


def _log_odds(log_probs: Tensor) -> Tensor:
    log_probs = log_probs.clamp(max=-torch.finfo(log_probs.dtype).eps)
    return log_probs - torch.log(-torch.expm1(log_probs))


def kto_loss(
    ratios: Tensor,
    is_desirable: Tensor,
    kl_baseline: Tensor,
    beta: float,
    desirable_weight: float,
    undesirable_weight: float,
) -> Tensor:
    """KTO (arXiv 2402.01306, equation 7) of n single answers; `is_desirable` [n] bool.

    weight * (1 - sigmoid(+-beta * (ratio - baseline))), plus for a desirable answer. The caller divides the sum by the
    step's answers. `kl_baseline` is a scalar, see there.
    """
    rewards = beta * (ratios - kl_baseline)
    return torch.where(
        is_desirable, desirable_weight * torch.sigmoid(-rewards), undesirable_weight * torch.sigmoid(rewards)
    )


def kl_baseline(policy: Tensor, reference: Tensor) -> Tensor:
    """KTO's reference point (arXiv 2402.01306, section 4.1): mean ratio of mismatched answers, at least 0, no gradient.

    [m] each, over the whole step: ln p(answer | another example's prompt). TRL gives each example the answer of the one
    before it in the batch, the first that of the last, and takes each micro-batch for itself.
    """
    return (policy - reference).detach().mean().clamp(min=0)
