"""Each preference loss equals TRL 1.16's own code, in value and in the gradient of every token's log-probability, fp64.

TRL has no pure functions: the method of its trainer that computes the loss is run on an instance that has the settings
and nothing else, with a model that returns random log-probabilities (or logits).

    sigmoid, ipo, hinge, robust, apo_zero, apo_down, sft term    trl.DPOTrainer._compute_loss
    kto                                                          trl.KTOTrainer._compute_loss
    simpo, sigmoid with label smoothing                          trl.experimental.cpo.CPOTrainer
    orpo                                                         trl.experimental.orpo.ORPOTrainer
"""

from collections import defaultdict
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from llmtrain.training.preference_losses import (
    Answers,
    LossName,
    StepFacts,
    kl_baseline,
    kto_loss,
    preference_loss,
    sigmoid_loss,
)

NUM_PAIRS, LENGTH, VOCABULARY = 6, 12, 17
TOLERANCE = 1e-12


@dataclass(frozen=True)
class Settings:
    loss: LossName
    beta: float = 0.3
    label_smoothing: float = 0.0
    sft_weight: float = 0.0
    target_margin: float = 0.7
    desirable_weight: float = 1.3
    undesirable_weight: float = 0.8


@dataclass(frozen=True)
class Rows:
    """Chosen answers, then rejected ones; a row is a prompt, an answer and padding."""

    ids: Tensor
    attention_mask: Tensor
    completion_mask: Tensor

    @property
    def is_target(self) -> Tensor:
        return self.completion_mask[:, 1:].bool()

    def sums(self, token_log_probs: Tensor) -> tuple[Tensor, Tensor]:
        chosen, rejected = (token_log_probs * self.is_target).sum(1).chunk(2)
        return chosen, rejected

    def answers(self, token_log_probs: Tensor) -> Answers:
        return Answers(*self.sums(token_log_probs), *self.is_target.sum(1).chunk(2))


def rows_of(prompt_tokens: list[int], seed: int) -> Rows:
    generator = torch.Generator().manual_seed(seed)
    positions, prompts = torch.arange(LENGTH), torch.tensor(prompt_tokens)[:, None]
    ends = prompts + torch.randint(1, LENGTH - max(prompt_tokens) + 1, (len(prompts), 1), generator=generator)
    return Rows(
        ids=torch.randint(1, VOCABULARY, (len(prompts), LENGTH), generator=generator),
        attention_mask=(positions < ends).long(),
        completion_mask=((positions >= prompts) & (positions < ends)).long(),
    )


PAIRS = rows_of([1, 2, 4, 3, 5, 2] * 2, seed=0)


def random_log_probs(rows: Rows, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (-3 * torch.rand(len(rows.ids), LENGTH - 1, dtype=torch.float64, generator=generator)).requires_grad_()


class FixedLogProbs:
    """A model with TRL's fused output layer that knows each row's log-probabilities by its ids."""

    def __init__(self, *known: tuple[Rows, Tensor]) -> None:
        self.known = known

    def __call__(self, input_ids: Tensor, labels: Tensor, **others: Any) -> SimpleNamespace:
        log_probs = next(values for rows, values in self.known if rows.ids is input_ids) * (labels[:, 1:] != -100)
        not_compared = torch.zeros_like(log_probs)
        return SimpleNamespace(
            log_probs=log_probs, entropy=not_compared, mean_logits=not_compared, is_top1=not_compared.bool()
        )


def bare(trainer: type, **settings: Any) -> Any:
    """An instance of TRL's trainer with `settings`, one process, and nothing else."""
    instance = object.__new__(trainer)
    accelerator = SimpleNamespace(
        device=torch.device("cpu"), gather_for_metrics=lambda value: value, gather=lambda value: value
    )
    common = {"accelerator": accelerator, "aux_loss_enabled": False, "is_encoder_decoder": False, "_tp_size": 1}
    metrics = {"_metrics": {"train": defaultdict(list)}, "_total_train_tokens": 0}
    instance.__dict__.update(common | metrics | {"model": SimpleNamespace(training=True)} | settings)
    return instance


def assert_equal(ours: Tensor, theirs: Tensor, leaf: Tensor) -> None:
    assert ours.dtype == torch.float64
    assert ours.item() == pytest.approx(theirs.item(), rel=TOLERANCE)
    (our_gradient,), (their_gradient,) = (torch.autograd.grad(loss, leaf) for loss in (ours, theirs))
    assert their_gradient.norm() > 1e-4
    assert (our_gradient - their_gradient).norm() <= TOLERANCE * their_gradient.norm()


def our_loss(settings: Settings, rows: Rows, token_log_probs: Tensor, reference: Answers | None, baseline=None):
    answers = rows.answers(token_log_probs)
    step = StepFacts(mean_chosen_tokens=answers.chosen_tokens.double().mean().item(), kl_baseline=baseline)
    return preference_loss(settings, answers, reference, step)


@pytest.mark.parametrize("sft_weight", [0.0, 0.4])
@pytest.mark.parametrize(
    ("loss", "label_smoothing"),
    [("sigmoid", 0.0), ("ipo", 0.0), ("hinge", 0.0), ("robust", 0.2), ("apo_zero", 0.0), ("apo_down", 0.0)],
)
def test_losses_with_a_reference_equal_dpo_trainers(loss, label_smoothing, sft_weight):
    import trl

    settings = Settings(loss, label_smoothing=label_smoothing, sft_weight=sft_weight)
    policy, reference = random_log_probs(PAIRS, 1), random_log_probs(PAIRS, 2).detach()
    reference_chosen, reference_rejected = PAIRS.sums(reference)
    trainer = bare(
        trl.DPOTrainer,
        loss_types=[loss, "sft"] if sft_weight else [loss],
        loss_weights=[1.0, sft_weight] if sft_weight else [1.0],
        beta=settings.beta,
        label_smoothing=label_smoothing,
        ld_alpha=None,
        precompute_ref_logps=True,
        f_divergence_type="reverse_kl",
        use_weighting=False,
    )
    inputs = {
        "input_ids": PAIRS.ids,
        "attention_mask": PAIRS.attention_mask,
        "completion_mask": PAIRS.completion_mask,
        "ref_chosen_logps": reference_chosen,
        "ref_rejected_logps": reference_rejected,
    }
    theirs = trainer._compute_loss(FixedLogProbs((PAIRS, policy)), inputs, False)
    ours = our_loss(settings, PAIRS, policy, PAIRS.answers(reference))
    assert_equal(ours.losses.sum() / NUM_PAIRS, theirs, policy)
    logged = trainer._metrics["train"]
    assert ours.margins.mean().item() == pytest.approx(logged["rewards/margins"][0], rel=TOLERANCE)
    changes = settings.beta * ours.chosen_changes
    assert changes.mean().item() == pytest.approx(logged["rewards/chosen"][0], rel=TOLERANCE)


@pytest.fixture
def kto_oracle():
    """TRL's loss of answers with labels, and the mismatched answers' log-probabilities behind its baseline."""
    import trl

    def compute(policy: Tensor, reference: Tensor, labels: Tensor, mismatched: Rows, kl: tuple[Tensor, Tensor]):
        settings = Settings("kto")
        trainer = bare(
            trl.KTOTrainer,
            loss_type="kto",
            beta=settings.beta,
            calculate_KL=True,
            precompute_ref_logps=True,
            desirable_weight=settings.desirable_weight,
            undesirable_weight=settings.undesirable_weight,
        )
        inputs = {
            "input_ids": PAIRS.ids,
            "attention_mask": PAIRS.attention_mask,
            "completion_mask": PAIRS.completion_mask,
            "KL_input_ids": mismatched.ids,
            "KL_attention_mask": mismatched.attention_mask,
            "KL_completion_mask": mismatched.completion_mask,
            "label": labels,
            "ref_logps": torch.cat(PAIRS.sums(reference)),
            "ref_KL_logps": torch.cat(mismatched.sums(kl[1])),
        }
        return trainer._compute_loss(FixedLogProbs((PAIRS, policy), (mismatched, kl[0])), inputs, False)

    return compute


@pytest.mark.parametrize("above", ["policy", "reference"])
def test_kto_equals_kto_trainers_for_pairs_and_for_single_answers(kto_oracle, above):
    settings = Settings("kto")
    policy, reference = random_log_probs(PAIRS, 1), random_log_probs(PAIRS, 2).detach()
    mismatched = rows_of([2, 1, 3, 4, 2, 5] * 2, seed=7)
    kl = random_log_probs(mismatched, 3), random_log_probs(mismatched, 4).detach()
    # a baseline above zero, and one that is clamped
    shift = {"policy": 1.0, "reference": -1.0}[above]
    kl = (kl[0].detach() + shift).requires_grad_(), kl[1]
    baseline = kl_baseline(torch.cat(mismatched.sums(kl[0])), torch.cat(mismatched.sums(kl[1])))
    assert (baseline > 0) == (above == "policy")
    assert not baseline.requires_grad

    pair_labels = torch.tensor([True] * NUM_PAIRS + [False] * NUM_PAIRS)
    theirs = kto_oracle(policy, reference, pair_labels, mismatched, kl)
    ours = our_loss(settings, PAIRS, policy, PAIRS.answers(reference), baseline)
    assert_equal(ours.losses.sum() / NUM_PAIRS, theirs, policy)

    labels = torch.tensor([True, True, False, True, False, True, True, True, False, True, True, True])
    ratios = torch.cat(PAIRS.sums(policy)) - torch.cat(PAIRS.sums(reference))
    weights = settings.desirable_weight, settings.undesirable_weight
    losses = kto_loss(ratios, labels, baseline, settings.beta, *weights)
    assert_equal(losses.sum() / len(labels), kto_oracle(policy, reference, labels, mismatched, kl), policy)


@dataclass(frozen=True)
class FixedLogits:
    """A model that returns these logits."""

    logits: Tensor

    def __call__(self, *arguments: Any, **others: Any) -> SimpleNamespace:
        return SimpleNamespace(logits=self.logits)

    def token_log_probs(self, rows: Rows) -> Tensor:
        return self.logits[:, :-1].log_softmax(-1).gather(2, rows.ids[:, 1:, None]).squeeze(2)


def random_logits(rows: Rows) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    shape = (len(rows.ids), LENGTH, VOCABULARY)
    return (2 * torch.randn(shape, dtype=torch.float64, generator=generator)).requires_grad_()


def concatenated(rows: Rows) -> dict[str, Tensor]:
    """The columns of the trainers that keep chosen and rejected rows apart."""
    columns = {
        "input_ids": rows.ids,
        "attention_mask": rows.attention_mask,
        "labels": torch.where(rows.completion_mask == 1, rows.ids, -100),
    }
    return {
        f"{name}_{column}": part
        for column, values in columns.items()
        for name, part in zip(("chosen", "rejected"), values.chunk(2), strict=True)
    }


@pytest.mark.parametrize("sft_weight", [0.0, 0.4])
def test_simpo_equals_cpo_trainers(sft_weight):
    from trl.experimental.cpo import CPOTrainer

    settings = Settings("simpo", sft_weight=sft_weight)
    trainer = bare(
        CPOTrainer,
        loss_type="simpo",
        alpha=0.0,
        beta=settings.beta,
        simpo_gamma=settings.target_margin * settings.beta,
        label_smoothing=0.0,
        cpo_alpha=sft_weight,
        pad_token_id=0,
    )
    model = FixedLogits(random_logits(PAIRS))
    theirs, logged = trainer.get_batch_loss_metrics(model, concatenated(PAIRS))
    ours = our_loss(settings, PAIRS, model.token_log_probs(PAIRS), reference=None)
    assert_equal(ours.losses.sum() / NUM_PAIRS, theirs, model.logits)
    assert ours.margins.mean().item() == pytest.approx(logged["rewards/margins"], rel=TOLERANCE)


def test_label_smoothing_of_the_sigmoid_loss_equals_cpo_trainers():
    from trl.experimental.cpo import CPOTrainer

    trainer = bare(CPOTrainer, loss_type="sigmoid", alpha=0.0, beta=0.3, label_smoothing=0.2)
    advantages = torch.linspace(-9, 9, 13, dtype=torch.float64, requires_grad=True)
    theirs, *_ = trainer.cpo_loss(advantages, torch.zeros_like(advantages))
    assert_equal(sigmoid_loss(advantages, 0.3, 0.2).sum(), theirs.sum(), advantages)


@pytest.mark.parametrize("sft_weight", [0.0, 0.4])
def test_orpo_equals_orpo_trainers_where_the_prompt_is_one_token(sft_weight, monkeypatch):
    """TRL also trains on the prompt's tokens: of one token, nothing predicts it. `sft_weight` adds to ORPO's own 1."""
    from trl.experimental.orpo import ORPOTrainer

    monkeypatch.setattr(Tensor, "float", Tensor.double)  # it rounds the odds to fp32
    rows, settings = rows_of([1] * (2 * NUM_PAIRS), seed=3), Settings("orpo", sft_weight=sft_weight)
    trainer = bare(ORPOTrainer, beta=settings.beta, padding_value=0)
    model = FixedLogits(random_logits(rows))
    theirs, logged = trainer.get_batch_loss_metrics(model, concatenated(rows))
    ours = our_loss(settings, rows, model.token_log_probs(rows), reference=None)
    assert ours.margins.mean().item() == pytest.approx(logged["rewards/margins"], rel=TOLERANCE)

    chosen = rows.is_target.clone()
    chosen[NUM_PAIRS:] = False
    theirs = theirs - sft_weight * model.token_log_probs(rows)[chosen].mean()
    assert_equal(ours.losses.sum() / NUM_PAIRS, theirs, model.logits)


@pytest.mark.parametrize("loss", ["sigmoid", "ipo", "hinge", "robust", "simpo", "orpo", "kto", "apo_zero", "apo_down"])
def test_the_losses_of_a_steps_micro_batches_add_up_to_the_steps(loss):
    settings = Settings(loss, sft_weight=0.4)
    policy, reference = PAIRS.answers(random_log_probs(PAIRS, 1)), PAIRS.answers(random_log_probs(PAIRS, 2).detach())
    step = StepFacts(policy.chosen_tokens.double().mean().item(), kl_baseline=torch.tensor(0.3))
    whole = preference_loss(settings, policy, reference, step).losses
    parts = [
        preference_loss(settings, cut(policy, part), cut(reference, part), step).losses
        for part in (slice(0, 1), slice(1, 4), slice(4, None))
    ]
    assert whole.shape == (NUM_PAIRS,)
    assert torch.equal(torch.cat(parts), whole)


def cut(answers: Answers, part: slice) -> Answers:
    names = ("chosen", "rejected", "chosen_tokens", "rejected_tokens")
    return replace(answers, **{name: getattr(answers, name)[part] for name in names})
