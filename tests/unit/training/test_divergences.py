"""Values found by hand, by PyTorch's kl_div, and by TRL's distillation loss."""

import math

import pytest
import torch
from torch import Tensor
from torch.nn.functional import kl_div

from llmtrain.training.divergences import TopK, divergence, top_k

NUM_TOKENS, VOCABULARY = 7, 23


def logits(seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 2 * torch.randn(NUM_TOKENS, VOCABULARY, dtype=torch.float64, generator=generator)


def of(*probabilities: float) -> Tensor:
    """Logits of one token's distribution."""
    return torch.tensor([probabilities], dtype=torch.float64).log() + 3.0


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_forward_and_reverse_equal_torchs_kl_div_and_trls_distillation_loss(temperature):
    from trl.experimental.gkd import GKDTrainer

    student, teacher = logits(0), logits(1)
    q, p = (student / temperature).log_softmax(1), (teacher / temperature).log_softmax(1)
    forward = divergence(student, teacher, temperature, "forward")
    reverse = divergence(student, teacher, temperature, "reverse")
    expected = temperature**2 * kl_div(q, p, reduction="none", log_target=True).sum(1)
    assert torch.allclose(forward, expected, rtol=1e-12, atol=0)
    expected = temperature**2 * kl_div(p, q, reduction="none", log_target=True).sum(1)
    assert torch.allclose(reverse, expected, rtol=1e-12, atol=0)
    for found, beta in ((forward, 0), (reverse, 1)):  # TRL's has no temperature^2
        theirs = GKDTrainer.generalized_jsd_loss(student, teacher, beta=beta, temperature=temperature)
        assert found.mean().item() == pytest.approx(temperature**2 * theirs.item(), rel=1e-12)


def test_both_directions_by_hand():
    student, teacher = of(0.5, 0.5), of(0.8, 0.2)
    forward = 0.8 * math.log(1.6) + 0.2 * math.log(0.4)
    assert divergence(student, teacher, 1.0, "forward").item() == pytest.approx(forward)
    reverse = 0.5 * math.log(0.625) + 0.5 * math.log(2.5)
    assert divergence(student, teacher, 1.0, "reverse").item() == pytest.approx(reverse)


def test_a_temperature_of_two_takes_square_roots_and_multiplies_by_four():
    # sqrt of (0.64, 0.16) in proportion: 2/3, 1/3; the student stays even
    forward = 4 * (2 / 3 * math.log(4 / 3) + 1 / 3 * math.log(2 / 3))
    assert divergence(of(0.5, 0.5), of(0.8, 0.2), 2.0, "forward").item() == pytest.approx(forward)


def test_the_top_k_and_the_rest_by_hand():
    teacher = top_k(of(0.1, 0.6, 0.05, 0.25), k=2, temperature=1.0)
    assert teacher.ids.tolist() == [[1, 3]]
    assert teacher.log_probs.exp().tolist()[0] == pytest.approx([0.6, 0.25, 0.15])
    student = of(0.3, 0.3, 0.2, 0.2)  # over the same events: 0.3, 0.2, 0.5
    forward = 0.6 * math.log(2) + 0.25 * math.log(1.25) + 0.15 * math.log(0.3)
    assert divergence(student, teacher, 1.0, "forward").item() == pytest.approx(forward)
    reverse = 0.3 * math.log(0.5) + 0.2 * math.log(0.8) + 0.5 * math.log(0.5 / 0.15)
    assert divergence(student, teacher, 1.0, "reverse").item() == pytest.approx(reverse)


@pytest.mark.parametrize("direction", ["forward", "reverse"])
@pytest.mark.parametrize("temperature", [0.7, 1.0, 2.5])
def test_over_the_top_k_it_lies_between_zero_and_the_whole_and_is_zero_when_the_k_agree(direction, temperature):
    student, teacher = logits(0), logits(1)
    whole = divergence(student, teacher, temperature, direction)
    found = [divergence(student, top_k(teacher, k, temperature), temperature, direction) for k in (1, 4, 22)]
    assert (found[0] > 0).all()
    for less, more in zip(found, [*found[1:], whole], strict=True):
        assert (less <= more * (1 + 1e-12)).all()  # k = 22 of 23 leaves one token in the rest: the whole
    assert torch.allclose(found[-1], whole, rtol=1e-10)

    kept = top_k(teacher, 4, temperature)
    elsewhere = torch.ones_like(teacher).scatter(1, kept.ids, 0).bool()
    shuffled = teacher.clone()
    shuffled[elsewhere] = teacher[elsewhere].view(NUM_TOKENS, -1).flip(1).flatten()
    assert divergence(shuffled, kept, temperature, direction).abs().max() < 1e-14
    assert divergence(shuffled, teacher, temperature, direction).min() > 0.001


@pytest.mark.parametrize("direction", ["forward", "reverse"])
@pytest.mark.parametrize("k", [None, 3])
def test_gradients_agree_with_finite_differences(direction, k):
    student, teacher = logits(0).requires_grad_(), logits(1)
    target = teacher if k is None else top_k(teacher, k, 1.7)
    assert torch.autograd.gradcheck(lambda z: divergence(z, target, 1.7, direction), (student,))


def test_the_gradient_of_forward_kl_is_temperature_times_the_difference_of_probabilities():
    student, teacher = logits(0).requires_grad_(), logits(1).requires_grad_()
    divergence(student, teacher, 3.0, "forward").sum().backward()
    expected = 3.0 * ((student / 3).softmax(1) - (teacher / 3).softmax(1))
    assert student.grad is not None
    assert torch.allclose(student.grad, expected, atol=1e-14)
    assert teacher.grad is None
    assert not top_k(teacher, 3, 1.0).log_probs.requires_grad


@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_a_rest_that_is_tiny_keeps_its_digits_in_fp32(direction):
    """A rest of e^-30 is lost in 1 - sum of the k; its log-probability must not be."""
    teacher = torch.tensor([[0.0, -1.0, -30.0, -31.0]])
    student = torch.tensor([[0.0, -1.0, -20.0, -21.0]], requires_grad=True)
    kept = top_k(teacher, 2, 1.0)
    assert kept.log_probs[0, 2].item() == pytest.approx(
        math.log(math.exp(-30) + math.exp(-31)) - math.log(1 + math.exp(-1)), rel=1e-6
    )
    found = divergence(student, kept, 1.0, direction)
    found.backward()
    assert found.dtype == torch.float32
    assert student.grad is not None
    assert student.grad.isfinite().all()


def test_a_top_k_that_was_stored_in_fp16_is_a_distribution_again():
    kept = top_k(logits(1), 5, 1.0)
    stored = TopK(kept.log_probs.half(), kept.ids)
    for direction in ("forward", "reverse"):
        same = divergence(logits(1), stored, 1.0, direction)
        assert same.min() >= 0
        assert same.max() < 1e-5


def test_a_token_that_the_teacher_excludes_costs_nothing_forward_and_everything_reverse():
    teacher, student = of(0.5, 0.5, 0.0), of(0.4, 0.4, 0.2).requires_grad_()
    forward = divergence(student, teacher, 1.0, "forward")
    assert forward.item() == pytest.approx(math.log(1.25))
    forward.backward()
    assert student.grad is not None
    assert student.grad[0].tolist() == pytest.approx([-0.1, -0.1, 0.2])
    assert divergence(student, teacher, 1.0, "reverse").item() == math.inf
