"""Tiny real runs: what they leave to be looked at, and that looking changes nothing."""

import shutil
import warnings
from pathlib import Path

import pytest
import torch

from llmtrain.config.compose import load_config
from llmtrain.config.root import TrainConfig
from llmtrain.errors import Interrupted
from llmtrain.report.records import Margins, Processes, Samples
from llmtrain.telemetry.metrics import read, without_times
from llmtrain.training import events, traces
from llmtrain.training.run import train

NOTES = [f"Note {n}: the sum of {n} and one is {n + 1}, as everybody knows who can count to {n + 2}. " * 6
         for n in range(60)]  # fmt: skip
TINY = ["model=qwen3_tiny", "model.attention_dropout=0.1", "infra.precision=fp32", "infra.threads=1", "tracking=none",
        "trainer.warmup_tokens=100", "trainer.log_every_tokens=256", "trainer.batch_rows=4",
        "data.validation_share=0.2", "data.test_share=0.2"]  # fmt: skip
PRETRAIN = [*TINY, "trainer.budget_tokens=2_560", "trainer.sequence_tokens=64", "trainer.evaluate_every_tokens=1_024",
            "trainer.checkpoint_every_tokens=512", "data=text_files", "data.corpus.licence=CC0-1.0"]  # fmt: skip
DPO = [
    *TINY,
    "trainer=dpo",
    "trainer.evaluate_every_tokens=1_000_000",
    "trainer.checkpoint_every_tokens=1_000_000",
    "data.pairs={kind: continuations, prompt_characters: 60, answer_characters: 40, max_training_pairs: 12}",
]


@pytest.fixture
def notes(tmp_path: Path, migrated: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for outputs in ("outputs", "other"):
        shutil.copytree(migrated, tmp_path / outputs)
    (tmp_path / "notes").mkdir()
    for number, text in enumerate(NOTES):
        (tmp_path / "notes" / f"{number:02}.txt").write_text(text)
    return tmp_path / "notes"


def run(notes: Path, outputs: str, sample_tokens: int) -> Path:
    """A pretraining in `outputs`; its directory."""
    trained = train(config_of(notes, outputs, sample_tokens), base_config=lambda: pytest.fail("none is needed"))
    return (Path(outputs) / trained.path).parent


def config_of(notes: Path, outputs: str, sample_tokens: int) -> TrainConfig:
    where = [f"outputs_dir={outputs}", f"data.corpus.paths=[{notes}/*.txt]"]
    return load_config([*PRETRAIN, *where, f"trainer.sample_tokens={sample_tokens}"])


def test_a_run_with_samples_computes_what_one_without_them_computes(notes: Path):
    silent, sampled = run(notes, "outputs", 0), run(notes, "other", 6)
    assert silent.name == sampled.name, "how much is shown is no part of the run id"
    weights = "model/model.safetensors"
    assert (silent / weights).read_bytes() == (sampled / weights).read_bytes()
    rows = [[without_times(row) for row in read(path / "metrics.jsonl")] for path in (silent, sampled)]
    assert rows[0] == rows[1]
    assert not (silent / "samples").exists()
    steps = [Samples.read(path) for path in sorted((sampled / "samples").iterdir())]
    assert [(found.step, found.tokens) for found in steps] == [(0, 0), (4, 1024), (8, 2048), (10, 2560)]
    prompts = [[sample.prompt for sample in found.samples] for found in steps]
    assert prompts == [prompts[0]] * 4
    assert all(prompt.startswith("Note ") for prompt in prompts[0])
    assert len({found.samples[0].continuation for found in steps}) > 1, "the model changes, and so does what it says"


def test_a_run_that_is_interrupted_has_a_report_and_ends_with_one_of_both_processes(
    notes: Path, monkeypatch: pytest.MonkeyPatch
):
    whole = run(notes, "outputs", 6)
    save = events.Between.save

    def save_and_stop(self, trainer, module):
        save(self, trainer, module)
        if module.step == 4:  # a signal that comes during a save ends the run after the next step
            self.stopped_by = events.signal.SIGINT

    with monkeypatch.context() as patch:
        patch.setattr(events.Between, "save", save_and_stop)
        with pytest.raises(Interrupted):
            run(notes, "other", 6)
    (cut,) = Path("other").glob("qwen3_tiny-pretrain/*/")
    assert "not finished: step 5, 1,280 tokens" in (cut / "report.html").read_text()
    assert run(notes, "other", 6) == cut
    assert "qwen3_tiny-pretrain@1.0.0" in (cut / "report.html").read_text()
    assert [process.tokens for process in Processes.read(cut / "processes.json").processes] == [1280, 1280]
    for path in (whole / "samples").iterdir():
        assert path.read_bytes() == (cut / "samples" / path.name).read_bytes()
    (process,) = Processes.read(whole / "processes.json").processes
    assert {
        "preparing",
        "plan",
        "baselines",
        "samples",
        "training",
        "evaluation",
        "checkpoints",
        "export",
        "report",
    } == set(process.seconds)
    assert {"CPU", "cores", "threads", "GPU", "Python", "llmtrain", "torch", "transformers"} <= process.machine.keys()


def test_a_preference_run_leaves_the_margin_of_every_test_pair(notes: Path):
    corpus = f"data.corpus={{kind: files, paths: ['{notes}/*.txt'], licence: CC0-1.0}}"
    config = load_config([*DPO, corpus, "trainer.sample_tokens=4"])
    trained = train(config, base_config=lambda: config_of(notes, "outputs", 0))
    directory = (Path("outputs") / trained.path).parent
    margins = Margins.read(directory / "margins.json")
    rewards = margins.beta * (torch.tensor(margins.after) - torch.tensor(margins.before))
    assert margins.split == "test"
    assert rewards.mean().item() == pytest.approx(trained.metrics["test/margin"], abs=1e-5)
    assert (rewards > 0).double().mean().item() == pytest.approx(trained.metrics["test/accuracy"])
    (process,) = Processes.read(directory / "processes.json").processes
    assert {"base model", "reference"} <= process.seconds.keys()
    html = (directory / "report.html").read_text()
    (base,) = Path("outputs/qwen3_tiny-pretrain").iterdir()
    assert f'href="../../qwen3_tiny-pretrain/{base.name}/report.html"' in html


def test_a_report_that_fails_is_told_and_training_goes_on(notes: Path, monkeypatch: pytest.MonkeyPatch):
    def broken(*_):
        raise ZeroDivisionError("a bug of ours")

    monkeypatch.setattr(traces, "page", broken)
    with pytest.raises(traces.ReportFailed, match="a bug of ours"):
        run(notes, "outputs", 0)  # the tests take it for an error, so that none is overlooked
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        directory = run(notes, "other", 0)
    assert (directory / "version.json").exists()
    assert any("in broken" in str(warning.message) for warning in told), "where it went wrong"
    assert any("goes on without a new" in str(warning.message) for warning in told)


def test_a_damaged_file_costs_the_report_and_not_the_run(notes: Path, capsys: pytest.CaptureFixture[str]):
    frozen_id = run(notes, "outputs", 0).name
    there = Path("other") / "qwen3_tiny-pretrain" / frozen_id
    there.mkdir(parents=True)
    (there / "processes.json").write_text("{")
    assert (run(notes, "other", 0) / "version.json").exists()
    assert "processes.json does not hold Processes" in capsys.readouterr().err
    assert not (there / "report.html").exists()
