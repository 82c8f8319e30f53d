"""Distillation's step against the plain one: all logits at once, PyTorch's cross-entropy and kl_div."""

import copy
from pathlib import Path

import pytest
import torch
from oracles import fit, gradients_of, in_fp64, largest_difference
from torch.nn.functional import cross_entropy, kl_div

from llmtrain.config.compose import load_config
from llmtrain.data.text import TokenShards
from llmtrain.models.attention import generating
from llmtrain.models.build import build
from llmtrain.models.packed import pack
from llmtrain.training.batches import TextSteps
from llmtrain.training.divergences import TopK
from llmtrain.training.module import CrossEntropy, Distillation
from llmtrain.training.teacher import Text, teacher_rows
from llmtrain.training.teacher_store import TeacherRows

VOCABULARY = 512


class Plain:
    """The teacher's and the student's networks, and the first step by all logits."""

    def __init__(self, config, teacher, student, step) -> None:
        rows = [row for micro_batch in step.micro_batches for row in micro_batch.indices.tolist()]
        self.trainer, self.rows = config.trainer, rows
        self.teacher, self.student = in_fp64(teacher), in_fp64(student)

    def step(self, shards: TokenShards, known: TeacherRows | None) -> tuple[float, dict]:
        """Loss and gradients; of the teacher's distribution what `known` keeps, or all of it."""
        trainer, losses = self.trainer, []
        for row in self.rows:
            ids = torch.from_numpy(shards.row(row, trainer.sequence_tokens))[None]
            with generating(self.student), generating(self.teacher):
                student = self.student(input_ids=ids[:, :-1], use_cache=False).logits[0]
                with torch.no_grad():
                    teacher = self.teacher(input_ids=ids[:, :-1], use_cache=False).logits[0]
            q, p = (logits / trainer.temperature for logits in (student, teacher))
            q, p = q.log_softmax(1), p.log_softmax(1)
            if known is not None:
                kept = known.of([row], "cpu")
                others = torch.ones_like(q).scatter(1, kept.ids, 0)
                q = torch.cat([q.gather(1, kept.ids), (q.exp() * others).sum(1, keepdim=True).log()], 1)
                p = kept.log_probs.double().exp()
                p = (p / p.sum(1, keepdim=True)).log()
            a, b = (q, p) if trainer.divergence == "forward" else (p, q)
            spread = trainer.temperature**2 * kl_div(a, b, reduction="none", log_target=True).sum(1)
            losses.append(
                trainer.ce_weight * cross_entropy(student, ids[0, 1:], reduction="none")
                + (1 - trainer.ce_weight) * spread
            )
        loss = torch.cat(losses).mean()
        loss.backward()
        return loss.item(), gradients_of(self.student)


@pytest.fixture
def distilled(network, shards, tmp_path: Path):
    """(our losses and gradients, the plain step, the store) of settings."""

    def doing(**changes: object):
        config = load_config(
            ["model=qwen3_tiny", "trainer=distill", "trainer.teacher=t@1.0.0", "infra.precision=fp32",
             "infra.micro_batch_tokens=40", "infra.loss_chunk_tokens=7", "trainer.sequence_tokens=16",
             "trainer.batch_rows=6", "trainer.budget_tokens=200", "trainer.max_grad_norm=1e6",
             "trainer.warmup_tokens=100",
             *(f"trainer.{name}={value}" for name, value in changes.items())]
        )  # fmt: skip
        torch.manual_seed(1)
        teacher = build(config.model)
        teacher.lm_head.weight.data *= 20  # a teacher that knows what it wants
        steps = TextSteps(shards, config.trainer, config.trainer.budget_tokens, "stream", config.infra)
        text = Text(shards, 16, range(steps.num_rows))
        known = teacher_rows(
            lambda: in_fp64(teacher), {"train": text}, config.trainer, vocab_size=VOCABULARY, weights_sha256="w",
            text_sha256="t", infra=config.infra, outputs=tmp_path, progress=lambda num_targets: None,
        )["train"]  # fmt: skip
        ours = fit(Distillation(in_fp64(network), config.trainer, config.infra, 192, known), steps)
        return config, steps, ours, Plain(config, teacher, network, steps[0]), known

    return doing


@pytest.mark.parametrize("divergence", ["forward", "reverse"])
def test_a_step_equals_the_one_by_all_logits_over_what_is_kept(distilled, shards, divergence):
    _, steps, ours, plain, known = distilled(teacher_top_k=5, temperature=2.0, ce_weight=0.3, divergence=divergence)
    assert len(steps[0].micro_batches) > 1
    loss, gradients = plain.step(shards, known)
    assert ours.losses[0] == pytest.approx(loss, rel=1e-12)
    assert largest_difference(ours.gradients[0], gradients) <= 1e-9


@pytest.mark.parametrize("divergence", ["forward", "reverse"])
def test_where_nearly_all_is_kept_it_is_the_whole_divergence_but_for_rounding(distilled, shards, divergence):
    _, _, ours, plain, _ = distilled(teacher_top_k=510, ce_weight=0.0, divergence=divergence)
    loss, gradients = plain.step(shards, None)
    assert loss > 0.1
    assert ours.losses[0] == pytest.approx(loss, rel=2e-3)  # fp16 has 11 bits: 2^-11 = 5e-4 of each ln p
    assert largest_difference(ours.gradients[0], gradients) <= 2e-2


def test_with_cross_entropy_alone_it_is_pretraining(distilled, network):
    config, steps, ours, _, _ = distilled(ce_weight=1.0)
    theirs = fit(CrossEntropy(in_fp64(network), config.trainer, config.infra, 192), steps)
    assert ours.losses == pytest.approx(theirs.losses, rel=1e-12)
    for step in range(len(theirs.losses)):
        assert largest_difference(ours.gradients[step], theirs.gradients[step]) <= 1e-12


def test_a_student_that_is_its_teacher_has_nothing_to_learn(network, shards, tmp_path, distilled):
    config, steps, _, _, _ = distilled(ce_weight=0.0, teacher_top_k=8)
    known = teacher_rows(
        lambda: copy.deepcopy(network), {"train": Text(shards, 16, range(steps.num_rows))}, config.trainer,
        vocab_size=VOCABULARY, weights_sha256="itself", text_sha256="t", infra=config.infra, outputs=tmp_path,
        progress=lambda num_targets: None,
    )["train"]  # fmt: skip
    losses = fit(Distillation(copy.deepcopy(network), config.trainer, config.infra, 192, known), steps).losses
    assert 0 <= losses[0] < 1e-5


def test_an_empty_micro_batch_adds_nothing(distilled):
    config, steps, _, plain, known = distilled()
    module = Distillation(plain.student, config.trainer, config.infra, 192, known)
    step = steps[0]
    micro_batch = step.micro_batches[0]
    micro_batch.packed, micro_batch.indices = pack([], pad_to=8), micro_batch.indices[:0]
    assert module.loss(micro_batch, step).item() == 0


def test_what_is_kept_can_be_cut():
    known = TopK(torch.arange(12.0).view(4, 3), torch.arange(8).view(4, 2))
    assert known[1:3].log_probs.tolist() == [[3.0, 4.0, 5.0], [6.0, 7.0, 8.0]]
    assert known[1:3].ids.tolist() == [[2, 3], [4, 5]]
