"""Values found by hand; test_preference_losses_against_trl.py has the comparison with TRL."""

import math
from dataclasses import dataclass
from typing import get_args

import pytest
import torch
from torch import Tensor

from llmtrain.training.preference_losses import (
    Answers,
    LossName,
    StepFacts,
    apo_down_loss,
    apo_zero_loss,
    hinge_loss,
    ipo_loss,
    kl_baseline,
    kto_loss,
    odds_ratio_loss,
    preference_loss,
    robust_loss,
    sigmoid_loss,
    simpo_loss,
)


def sigmoid(value: float) -> float:
    return 1 / (1 + math.exp(-value))


def tensor(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


@dataclass(frozen=True)
class Settings:
    loss: LossName
    beta: float = 0.5
    label_smoothing: float = 0.0
    sft_weight: float = 0.0
    target_margin: float = 0.5
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0


def test_smoothed_sigmoid_loss_is_least_where_the_margin_says_how_sure_the_label_is():
    margin = math.log(0.8 / 0.2)  # sigmoid(margin) = 0.8 is the chance that the label is right
    at, below, above = sigmoid_loss(tensor(margin, margin - 0.1, margin + 0.1), 1.0, 0.2)
    assert at.item() == pytest.approx(-0.8 * math.log(0.8) - 0.2 * math.log(0.2))
    assert at < below
    assert at < above


def test_robust_loss_is_unbiased_when_its_share_of_labels_is_turned_round():
    advantage, wrong = tensor(0.7), 0.3
    expected = 0.7 * robust_loss(advantage, 1.0, wrong) + 0.3 * robust_loss(-advantage, 1.0, wrong)
    assert expected.item() == pytest.approx(sigmoid_loss(advantage, 1.0, 0.0).item(), rel=1e-12)


def test_hinge_is_zero_beyond_a_margin_of_one():
    assert hinge_loss(tensor(-2.0, 1.0, 2.0, 3.0), 0.5).tolist() == [2.0, 0.5, 0.0, 0.0]


def test_ipo_is_zero_where_the_advantage_per_token_is_one_over_two_beta():
    # 1 / (2 * 0.25) = 2
    assert ipo_loss(tensor(1.5, 1.0), tensor(-0.5, 0.0), beta=0.25).tolist() == [0.0, 1.0]


def test_apo_zero_and_down_by_hand():
    chosen, rejected = tensor(2.0), tensor(-4.0)
    zero = 1 - sigmoid(1.0) + sigmoid(-2.0)
    assert apo_zero_loss(chosen, rejected, 0.5).item() == pytest.approx(zero, rel=1e-12)
    down = sigmoid(1.0) + 1 - sigmoid(3.0)
    assert apo_down_loss(chosen, rejected, 0.5).item() == pytest.approx(down, rel=1e-12)


def test_simpo_is_log_two_where_the_mean_advantage_is_the_target():
    assert simpo_loss(tensor(-1.0), tensor(-1.5), beta=2.0, target_margin=0.5).item() == pytest.approx(math.log(2))


def test_odds_ratio_by_hand():
    # p = 0.8 has odds 4, p = 0.5 odds 1: -ln(4 / (4 + 1))
    assert odds_ratio_loss(tensor(math.log(0.8)), tensor(math.log(0.5))).item() == pytest.approx(-math.log(0.8))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_odds_ratio_and_its_gradient_are_finite_for_answers_that_are_certain_or_hopeless(dtype):
    chosen = torch.tensor([0.0, -1e-9, -1e-7, -1e4, 0.0], dtype=dtype, requires_grad=True)
    rejected = torch.tensor([-1.0, -1.0, -1.0, -1.0, 0.0], dtype=dtype, requires_grad=True)
    losses = odds_ratio_loss(chosen, rejected)
    losses.sum().backward()
    assert losses.isfinite().all()
    assert losses[3].item() == pytest.approx(1e4, rel=1e-3)
    for leaf in (chosen, rejected):
        assert leaf.grad is not None
        assert leaf.grad.isfinite().all()


def test_kto_by_hand_with_a_baseline_and_weights():
    losses = kto_loss(tensor(3.0, 3.0), torch.tensor([True, False]), tensor(1.0)[0], 0.5, 2.0, 3.0)
    assert losses.tolist() == pytest.approx([2.0 * (1 - sigmoid(1.0)), 3.0 * (1 - sigmoid(-1.0))])


def test_kl_baseline_is_the_mean_ratio_at_least_zero_and_has_no_gradient():
    policy = tensor(-1.0, -2.0).requires_grad_()
    assert kl_baseline(policy, tensor(-2.0, -4.0)).item() == 1.5
    assert kl_baseline(policy, tensor(0.0, 0.0)).item() == 0.0
    assert not kl_baseline(policy, tensor(-2.0, -4.0)).requires_grad


def a_pair(dtype: torch.dtype) -> tuple[Answers, Answers]:
    policy = Answers(
        torch.tensor([-8.0], dtype=dtype, requires_grad=True),
        torch.tensor([-6.0], dtype=dtype, requires_grad=True),
        torch.tensor([4]),
        torch.tensor([2]),
    )
    reference = Answers(torch.tensor([-10.0], dtype=dtype), torch.tensor([-5.0], dtype=dtype), *policy_tokens(policy))
    return policy, reference


def policy_tokens(policy: Answers) -> tuple[Tensor, Tensor]:
    return policy.chosen_tokens, policy.rejected_tokens


STEP = StepFacts(mean_chosen_tokens=5.0, kl_baseline=torch.tensor(0.25))
# ratios 2 and -1, advantage 3; per token 0.5 and -0.5; means -2 and -3
EXPECTED = {
    "sigmoid": -math.log(sigmoid(1.5)),
    "ipo": 0.0,
    "hinge": 0.0,
    "robust": -math.log(sigmoid(1.5)),
    "simpo": -math.log(sigmoid(0.25)),
    "orpo": 8 / 5 - 0.5 * math.log(sigmoid(1 - math.log(1 - math.exp(-2)) + math.log(1 - math.exp(-3)))),
    "kto": (1 - sigmoid(0.875) + 1 - sigmoid(0.625)) / 2,
    "apo_zero": 1 - sigmoid(1.0) + sigmoid(-0.5),
    "apo_down": sigmoid(1.0) + 1 - sigmoid(1.5),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("loss", get_args(LossName))
def test_each_loss_of_a_pair_by_hand_in_the_precision_of_its_arguments(loss: LossName, dtype):
    policy, reference = a_pair(dtype)
    found = preference_loss(Settings(loss), policy, reference, STEP)
    assert found.losses.dtype == found.margins.dtype == found.chosen_changes.dtype == dtype
    relative = 1e-12 if dtype == torch.float64 else 1e-5
    assert found.losses.item() == pytest.approx(EXPECTED[loss], rel=relative, abs=1e-12)
    assert found.margins.item() == pytest.approx(0.5 if loss in ("simpo", "orpo") else 1.5)
    assert found.chosen_changes.item() == 2.0
    # 0.1 * 8 nats / 5 tokens
    with_sft = preference_loss(Settings(loss, sft_weight=0.1), policy, reference, STEP)
    assert (with_sft.losses - found.losses).item() == pytest.approx(0.16, rel=1e-5)


def test_without_a_reference_the_change_is_the_log_probability_itself():
    policy, _ = a_pair(torch.float64)
    assert preference_loss(Settings("simpo"), policy, None, STEP).chosen_changes.item() == -8.0
    with pytest.raises(AssertionError, match="ipo needs a reference"):
        preference_loss(Settings("ipo"), policy, None, STEP)


@pytest.mark.parametrize("loss", get_args(LossName))
def test_gradients_agree_with_finite_differences(loss: LossName):
    policy, reference = a_pair(torch.float64)

    def losses(chosen: Tensor, rejected: Tensor) -> Tensor:
        answers = Answers(chosen, rejected, *policy_tokens(policy))
        return preference_loss(Settings(loss, beta=0.3, sft_weight=0.1), answers, reference, STEP).losses

    assert torch.autograd.gradcheck(losses, (policy.chosen, policy.rejected))
