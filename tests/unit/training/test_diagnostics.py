"""Figures and warnings of preference runs, found by hand."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from llmtrain.training.diagnostics import correlation, kl_estimates, preference_diagnostics, warnings_of
from llmtrain.training.preference_losses import Answers


def tensor(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


# four pairs; tokens 4, 2, 2, 3 against 2, 4, 1, 3: longer, shorter, longer, equal
REFERENCE = Answers(tensor(-9, -5, -4, -6), tensor(-3, -8, -2, -6), tensor(4, 2, 2, 3), tensor(2, 4, 1, 3))


def moved(chosen: Tensor, rejected: Tensor) -> Answers:
    return Answers(
        REFERENCE.chosen + chosen,
        REFERENCE.rejected + rejected,
        REFERENCE.chosen_tokens,
        REFERENCE.rejected_tokens,
    )


def test_a_policy_that_is_its_reference_has_no_change_no_distance_and_no_warning():
    figures = preference_diagnostics(REFERENCE, REFERENCE, torch.zeros(4))
    assert figures["chosen_logp_change_per_token"] == figures["rejected_logp_change_per_token"] == 0
    assert figures["kl_k1"] == figures["kl_k3"] == figures["margin_length_correlation"] == 0
    assert figures["accuracy_longer_chosen"] == figures["accuracy_shorter_chosen"] == 0.5  # ties
    assert warnings_of(figures | {"margin": 0.0}) == []


def test_figures_of_four_pairs_by_hand():
    chosen, rejected = tensor(1.0, -3.0, 0.5, 0.4), tensor(-1.0, 1.0, -0.5, 0.6)
    figures = preference_diagnostics(moved(chosen, rejected), REFERENCE, chosen - rejected)
    assert figures["chosen_logp_change_per_token"] == pytest.approx(-1.1 / 11)
    assert figures["rejected_logp_change_per_token"] == pytest.approx(0.1 / 10)
    assert figures["kl_k1"] == pytest.approx(-1.0 / 21)
    # margins 2, -4, 1, -0.2 and extra tokens 2, -2, 1, 0
    assert figures["margin_length_correlation"] == pytest.approx(np.corrcoef([2, -4, 1, -0.2], [2, -2, 1, 0])[0, 1])
    assert figures["accuracy_longer_chosen"] == 1.0
    assert figures["accuracy_shorter_chosen"] == 0.0
    assert figures["accuracy_length_gap"] == 1.0


def test_the_gap_of_accuracies_has_the_standard_error_of_a_difference():
    tokens = torch.cat([torch.full((100,), 2), torch.full((50,), 1)])
    answers = Answers(torch.zeros(150), torch.zeros(150), tokens, 3 - tokens)
    margins = torch.cat([torch.ones(80), -torch.ones(20), torch.ones(20), -torch.ones(30)])
    figures = preference_diagnostics(answers, answers, margins)
    assert figures["accuracy_length_gap"] == pytest.approx(0.8 - 0.4)
    assert figures["accuracy_length_gap_se"] == pytest.approx(math.sqrt(0.8 * 0.2 / 100 + 0.4 * 0.6 / 50))


def test_where_the_longer_answer_is_always_chosen_there_is_no_gap():
    answers = Answers(torch.zeros(2), torch.zeros(2), torch.tensor([3, 4]), torch.tensor([1, 1]))
    figures = preference_diagnostics(answers, answers, torch.tensor([1.0, 2.0]))
    assert "accuracy_longer_chosen" in figures
    assert not {"accuracy_shorter_chosen", "accuracy_length_gap"} & figures.keys()
    assert warnings_of(figures | {"margin": 1.5}) == []


def test_correlation_is_pearsons_and_zero_for_constants():
    assert correlation(tensor(1, 2, 3), tensor(-1, -2, -3)) == pytest.approx(-1)
    assert correlation(tensor(1, 2, 3), tensor(5, 5, 5)) == 0.0
    # of (-1, 1, 0, 0) and (-1, 0, 1, 0): 1 / 2
    assert correlation(tensor(0, 2, 1, 1), tensor(4, 5, 6, 5)) == pytest.approx(0.5)


def test_kl_estimates_by_hand():
    # ratios per token ln 2 (3 tokens) and -ln 2 (1 token)
    k1, k3 = kl_estimates(tensor(3 * math.log(2), -math.log(2)), torch.tensor([3, 1]))
    assert k1 == pytest.approx(0.5 * math.log(2))
    assert k3 == pytest.approx(0.75 * (0.5 - 1 + math.log(2)) + 0.25 * (2 - 1 - math.log(2)))


def test_both_estimates_find_the_kl_of_tokens_that_the_policy_wrote_and_k3_is_never_negative():
    policy, reference = tensor(0.6, 0.3, 0.1), tensor(0.3, 0.3, 0.4)
    kl = (policy * (policy / reference).log()).sum().item()
    tokens = torch.multinomial(policy, 200_000, replacement=True, generator=torch.Generator().manual_seed(0))
    ratios = (policy / reference).log()[tokens]
    k1, k3 = kl_estimates(ratios, torch.ones(len(ratios)))
    assert k1 == pytest.approx(kl, rel=0.02)
    assert k3 == pytest.approx(kl, rel=0.02)
    assert kl_estimates(torch.randn(100), torch.full((100,), 7))[1] >= 0


def test_collapse_is_warned_of_only_while_the_margin_rises():
    falling = preference_diagnostics(moved(tensor(-1, -1, -1, -1), tensor(-3, -3, -3, -3)), REFERENCE, torch.ones(4))
    assert falling["chosen_logp_change_per_token"] == pytest.approx(-4 / 11)
    (warning, *_) = warnings_of(falling | {"margin": 0.2})
    assert "-0.36 nats a token" in warning
    assert "trainer.sft_weight" in warning
    assert not any("collapsing" in warning for warning in warnings_of(falling | {"margin": -0.1}))


def test_a_preference_for_length_is_warned_of_with_both_accuracies():
    generator = torch.Generator().manual_seed(0)
    chosen_tokens, rejected_tokens = torch.randint(5, 50, (2, 200), generator=generator)
    extra = (chosen_tokens - rejected_tokens).double()
    answers = Answers(-extra, torch.zeros(200).double(), chosen_tokens, rejected_tokens)
    biased = preference_diagnostics(answers, answers, extra + 0.1)
    (warning,) = warnings_of(biased | {"margin": 1.0})
    assert "accuracy 100% where the longer one is chosen and 0% where the shorter one is" in warning
    assert "trainer.loss=ipo" in warning
    fair = preference_diagnostics(answers, answers, torch.randn(200, generator=generator) + 0.5)
    assert warnings_of(fair | {"margin": 0.5}) == []


def test_a_policy_far_from_its_reference_is_warned_of():
    up = 2 * REFERENCE.chosen_tokens.double(), 2 * REFERENCE.rejected_tokens.double()
    figures = preference_diagnostics(moved(*up), REFERENCE, torch.ones(4))
    assert figures["kl_k3"] == pytest.approx(math.exp(-2) - 1 + 2)
    (warning,) = warnings_of(figures | {"margin": 1.0})
    assert "1.14 nats a token; raise trainer.beta" in warning
