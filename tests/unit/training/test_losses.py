"""Values found by hand, and by PyTorch's own functions."""

import math

import pytest
import torch

from llmtrain.training.losses import accuracy, bits_per_byte, cross_entropy, dpo_sigmoid, unigram_loss


def test_loss_is_log_two_when_policy_equals_reference():
    chosen, rejected = torch.tensor([-3.0, -7.5]), torch.tensor([-2.0, -9.0])
    found = dpo_sigmoid(chosen, rejected, chosen, rejected, beta=0.1)
    assert found.losses.tolist() == pytest.approx([math.log(2)] * 2)
    assert found.margins.tolist() == [0.0, 0.0]
    assert found.chosen_changes.tolist() == [0.0, 0.0]


def test_loss_and_margin_of_a_pair_found_by_hand():
    # chosen rose by 2, rejected fell by 1: margin 0.5 * (2 - (-1)) = 1.5, loss ln(1 + e^-1.5)
    found = dpo_sigmoid(
        torch.tensor([-8.0]), torch.tensor([-6.0]), torch.tensor([-10.0]), torch.tensor([-5.0]), beta=0.5
    )
    assert found.margins.item() == pytest.approx(1.5)
    assert found.losses.item() == pytest.approx(math.log(1 + math.exp(-1.5)))
    assert found.chosen_changes.item() == pytest.approx(2.0)


def test_gradient_of_the_loss_is_minus_beta_times_the_chance_of_being_wrong():
    chosen = torch.tensor([-8.0], dtype=torch.float64, requires_grad=True)
    rejected = torch.tensor([-6.0], dtype=torch.float64)
    found = dpo_sigmoid(chosen, rejected, torch.tensor([-10.0]).double(), torch.tensor([-5.0]).double(), beta=0.5)
    found.losses.sum().backward()
    assert chosen.grad is not None
    assert chosen.grad.item() == pytest.approx(-0.5 / (1 + math.exp(1.5)))


def test_a_large_negative_margin_costs_its_size_and_not_infinity():
    found = dpo_sigmoid(torch.tensor([-1e4]), torch.tensor([0.0]), torch.tensor([0.0]), torch.tensor([0.0]), beta=1.0)
    assert found.losses.item() == pytest.approx(1e4)


def test_cross_entropy_equals_torchs_on_logits():
    logits, targets = torch.randn(7, 11, dtype=torch.float64), torch.arange(7)
    log_probs = logits.log_softmax(1).gather(1, targets[:, None]).squeeze(1)
    expected = torch.nn.functional.cross_entropy(logits, targets)
    assert cross_entropy(log_probs, num_targets=7).item() == pytest.approx(expected.item(), rel=1e-12)


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
