"""Tiny real runs of trainers that learn from a parent or a teacher: what they are held against, and that a stop in
between leaves no trace."""

import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from test_traces import NOTES, TINY

from llmtrain.artifacts import TrainedModel
from llmtrain.config.compose import load_config
from llmtrain.data.preferences import Pair, PairText, PairWriter, PreferencePairs
from llmtrain.errors import ConfigError, Interrupted, TokenizerMismatch
from llmtrain.telemetry.metrics import read, without_times
from llmtrain.training import events
from llmtrain.training.batches import AnswerLogProbs
from llmtrain.training.evaluation import vote_figures
from llmtrain.training.run import train

TEXT = [*TINY, "trainer.sequence_tokens=64", "trainer.evaluate_every_tokens=1_024",
        "trainer.checkpoint_every_tokens=512", "data=text_files", "data.corpus.licence=CC0-1.0"]  # fmt: skip
DISTILL = ["trainer=distill", *TEXT, "model.hidden_size=32", "model.num_hidden_layers=1", "trainer.teacher_top_k=8",
           "trainer.budget_tokens=2_560", "trainer.sample_tokens=4"]  # fmt: skip
PAIRS = "data.pairs={kind: continuations, prompt_characters: 60, answer_characters: 40, max_training_pairs: 8}"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, migrated: Path) -> Path:
    """A directory with notes, and a teacher in outputs."""
    place = tmp_path_factory.mktemp("tasks")
    (place / "notes").mkdir()
    for number, text in enumerate(NOTES):
        (place / "notes" / f"{number:02}.txt").write_text(text)
    shutil.copytree(migrated, place / "outputs")
    run(place, "outputs", [*TEXT, "trainer.budget_tokens=10_240", "trainer.lr=1e-2", "trainer.sample_tokens=0"])
    shutil.copytree(place / "outputs", place / "other")
    return place


def run(place: Path, outputs: str, overrides: list[str]) -> TrainedModel:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        config = load_config([*overrides, f"outputs_dir={outputs}", "data.corpus.paths=[notes/*.txt]"])
        return train(config, base_config=lambda: pytest.fail("none is needed"))


def distill(place: Path, outputs: str, *more: str) -> TrainedModel:
    tokenizer = f"model.tokenizer={{kind: hf, path: {next(place.glob('outputs/qwen3_tiny-pretrain/*/model'))}}}"
    return run(place, outputs, [*DISTILL, "trainer.teacher=qwen3_tiny-pretrain@1.0.0", tokenizer, *more])


@pytest.fixture(scope="module")
def student(place: Path) -> TrainedModel:
    return distill(place, "outputs")


def test_a_student_is_held_against_a_unigram_model_and_its_teacher(place: Path, student: TrainedModel):
    (teacher,) = place.glob("outputs/qwen3_tiny-pretrain/*/trained.json")
    taught, found = TrainedModel.read(teacher), student.metrics
    assert found["teacher/heldout_loss"] == pytest.approx(taught.metrics["test/loss"], rel=1e-5)
    assert found["teacher/heldout_bits_per_byte"] == pytest.approx(taught.metrics["test/bits_per_byte"], rel=1e-5)
    assert found["unigram/heldout_loss"] == taught.metrics["unigram/loss"]
    assert found["test/loss"] == pytest.approx(0.1 * found["test/heldout_loss"] + 0.9 * found["test/divergence"])
    rows = read((place / "outputs" / student.path).parent / "metrics.jsonl")
    divergences = [row["validation/divergence"] for row in rows if "validation/divergence" in row]
    assert divergences[-1] < divergences[0]
    assert student.trainer == "distill"
    assert taught.sha256 in student.parents


def test_a_student_that_is_interrupted_ends_as_if_it_had_not_been(
    place: Path, student: TrainedModel, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    save = events.Between.save

    def save_and_stop(self, trainer, module):
        save(self, trainer, module)
        if module.step == 6:
            self.stopped_by = events.signal.SIGINT

    with monkeypatch.context() as patch:
        patch.setattr(events.Between, "save", save_and_stop)
        with pytest.raises(Interrupted):
            distill(place, "other")
    (file,) = place.glob("other/teacher/*/train.ids-00000.uint16")
    file.write_bytes(file.read_bytes()[:-1])  # and what was kept of the teacher is damaged
    continued = distill(place, "other")
    assert "computing it anew" in capsys.readouterr().err
    assert continued.weights_sha256 == student.weights_sha256
    assert continued.metrics == student.metrics
    one, other = ((place / outputs / student.path).parent for outputs in ("outputs", "other"))
    rows = [[without_times(row) for row in read(directory / "metrics.jsonl")] for directory in (one, other)]
    assert rows[0] == rows[1]
    assert "the teacher" in (other / "report.html").read_text()


def test_a_teacher_with_other_words_is_refused(place: Path):
    with pytest.raises(TokenizerMismatch, match=r"another vocabulary than the student.*model.tokenizer=\{kind: hf"):
        run(place, "outputs", [*DISTILL, "trainer.teacher=qwen3_tiny-pretrain@1.0.0",
                               "model.tokenizer.vocab_size=300"])  # fmt: skip


@pytest.mark.parametrize(
    ("loss", "at_the_start"),
    [("sigmoid", math.log(2)), ("ipo", 25.0), ("kto", 0.5), ("simpo", None)],  # ipo: (1 / (2 * 0.1))^2
)
def test_every_preference_run_knows_its_loss_at_the_reference_and_has_a_report(place: Path, loss: str, at_the_start):
    (base,) = place.glob("outputs/qwen3_tiny-pretrain/*/")
    corpus = "data.corpus={kind: files, paths: ['notes/*.txt'], licence: CC0-1.0}"
    trained = run(place, "outputs", ["trainer=dpo", *TINY, f"name={loss}", f"trainer.loss={loss}", corpus, PAIRS,
                                     f"trainer.init_from={base}", "trainer.epochs=1", "trainer.sample_tokens=0",
                                     "trainer.evaluate_every_tokens=1_000_000"])  # fmt: skip
    if at_the_start is not None:
        assert trained.metrics["base/loss"] == pytest.approx(at_the_start, rel=1e-6)
    assert ("test/kl_k3" in trained.metrics) == (loss != "kto")
    html = ((place / "outputs" / trained.path).parent / "report.html").read_text()
    assert f"trainer.loss={loss}" in html
    assert f"{loss}@1.0.0" in html


def test_votes_of_one_kind_have_no_margin_and_no_figure_that_is_not_finite(tmp_path: Path):
    writer = PairWriter(tmp_path, "test", np.dtype("<u2"))
    for number in range(4):
        ids = Pair(np.array([number]), np.array([1, 2]), np.array([3]))
        writer.append(ids, PairText("p", "a", "b", "here"), is_desirable=False)
    writer.close()
    trainer = load_config(["trainer=kto", "model=qwen3_tiny"]).trainer
    reference = AnswerLogProbs(torch.full((4,), -3.0), torch.full((4,), -2.0))
    policy = AnswerLogProbs(reference.chosen - 1, reference.rejected)  # rewards of -0.1, against a baseline of 0
    found = vote_figures(policy, reference, PreferencePairs(tmp_path, "test"), trainer)
    assert found == {"loss": pytest.approx(1 / (1 + math.exp(0.1)), rel=1e-6), "accuracy": 1.0, "accuracy_se": 0.0}


def test_orpo_takes_no_second_cross_entropy():
    with pytest.raises(ConfigError, match=r"loss=orpo has it; set trainer.sft_weight=0"):
        load_config(["trainer=dpo", "trainer.loss=orpo", "trainer.sft_weight=0.2"])
