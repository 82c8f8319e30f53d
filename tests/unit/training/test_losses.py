"""Values found by hand, and by PyTorch's own functions."""

import math

import pytest
import torch

from llmtrain.training.losses import accuracy, bits_per_byte, unigram_loss
from llmtrain.training.preference_losses import sigmoid_loss


def test_dpo_costs_log_two_when_policy_equals_reference():
    assert sigmoid_loss(torch.zeros(2), 0.1, 0.0).tolist() == pytest.approx([math.log(2)] * 2)


def test_gradient_of_dpo_is_minus_beta_times_the_chance_of_being_wrong():
    # chosen rose by 2, rejected fell by 1: margin 0.5 * (2 - (-1)) = 1.5
    advantage = torch.tensor([3.0], dtype=torch.float64, requires_grad=True)
    found = sigmoid_loss(advantage, 0.5, 0.0)
    assert found.item() == pytest.approx(math.log(1 + math.exp(-1.5)))
    found.sum().backward()
    assert advantage.grad is not None
    assert advantage.grad.item() == pytest.approx(-0.5 / (1 + math.exp(1.5)))


def test_a_large_negative_margin_costs_its_size_and_not_infinity():
    assert sigmoid_loss(torch.tensor([-1e4]), 1.0, 0.0).item() == pytest.approx(1e4)


def test_accuracy_counts_ties_as_half_and_its_error_is_binomial():
    share, standard_error = accuracy(torch.tensor([1.0, 2.0, -1.0, 0.0]))
    assert share == 0.625
    assert standard_error == pytest.approx(math.sqrt(0.625 * 0.375 / 4))


def test_unigram_loss_of_a_fair_coin_is_log_two_and_unseen_tokens_cost_a_finite_amount():
    assert unigram_loss(torch.tensor([499, 499]), torch.tensor([3, 5])) == pytest.approx(math.log(2))
    # counts + 1 = [4, 1]: the second token has probability 1/5
    assert unigram_loss(torch.tensor([3, 0]), torch.tensor([0, 2])) == pytest.approx(math.log(5))


def test_bits_per_byte_of_one_nat_per_token_at_four_bytes_a_token():
    assert bits_per_byte(1.0, num_tokens=10, num_bytes=40) == pytest.approx(1 / math.log(2) / 4)
