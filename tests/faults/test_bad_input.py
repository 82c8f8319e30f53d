"""A user's mistakes: one message with the next step, the exit code of the design, and nothing that existed is lost."""

import fcntl
from pathlib import Path

import pytest
import torch

from llmtrain.telemetry.metrics import read
from tests.faults.commands import PRETRAIN, SMALL, files
from tests.faults.runs import text

pytestmark = pytest.mark.usefixtures("here")


def test_a_tokenizer_larger_than_the_model(fails, tmp_path):
    from llmtrain.data.tokenizer import train_bpe

    text(Path())
    words = " ".join(topic.read_text() for topic in Path("text").iterdir())
    (tmp_path / "tokenizer").mkdir()
    train_bpe([words], 1_000, tmp_path / "tokenizer")
    arguments = [*PRETRAIN, *files("text/*.txt"), "model.tokenizer={kind: hf, path: tokenizer}"]
    fails(arguments, 2, "1,000", "model.vocab_size=512", "set model.vocab_size=1024")


def test_a_tokenizer_that_is_not_there(fails):
    text(Path())
    arguments = [*PRETRAIN, *files("text/*.txt"), "model.tokenizer={kind: hf, path: ./absent}"]
    fails(arguments, 2, "absent")


def test_a_model_to_tune_that_is_not_there(fails):
    dpo = [*SMALL, "trainer=dpo"]
    fails([*dpo, "trainer.init_from=nothing@1.0.0"], 2, "nothing")
    fails([*dpo, "trainer.init_from=outputs/nowhere"], 2, "outputs/nowhere", "llmtrain models")


def test_a_checkpoint_of_another_model_is_refused_and_the_run_it_came_from_stays(trained, fails):
    dpo = [
        *SMALL,
        "trainer=dpo",
        "data.corpus={kind: files, paths: [text/*.txt], licence: PSF-2.0}",
        "trainer.init_from=qwen3_tiny-pretrain@1.0.0",
    ]
    (model,) = Path("outputs/qwen3_tiny-pretrain").glob("*/model/model.safetensors")
    before = model.read_bytes()
    fails([*dpo, "model.hidden_size=32"], 2, "hidden_size=64 (the config asks for 32)")
    assert model.read_bytes() == before


def test_a_loss_that_is_not_a_number_stops_the_run_and_keeps_the_checkpoint_before(fails, monkeypatch, capsys):
    """A real one: a learning rate of 1e6 without clipping worth its name."""
    text(Path())
    mad = [
        "trainer.lr=1e30",
        "trainer.max_grad_norm=1e30",
        "trainer.checkpoint_every_tokens=1",
        "trainer.warmup_tokens=0",
    ]
    error = fails([*PRETRAIN, *files("text/*.txt"), *mad], 3, "Lower trainer.lr (now 1e+30)")
    assert "step" in error
    (run,) = (path for path in Path("outputs/qwen3_tiny-pretrain").iterdir() if path.is_dir())
    checkpoints = sorted(run.glob("checkpoints/step-*"))
    assert checkpoints, "the steps before were saved"
    state = torch.load(checkpoints[0] / "state.pt", weights_only=True)
    assert state["clock"]["step"] == int(checkpoints[0].name[-8:])
    assert not (run / "version.json").exists()
    assert read(run / "metrics.jsonl") is not None


def test_a_second_process_on_the_same_run_is_refused(trained, fails):
    (run,) = (path for path in Path("outputs/qwen3_tiny-pretrain").iterdir() if path.is_dir())
    with (run / "lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        fails([*PRETRAIN, *files("text/*.txt")], 75, "another process works on this run")


def test_a_flipped_bit_in_prepared_data_is_found_before_training_and_its_directory_is_named(trained, fails):
    (shard,) = Path("outputs/data").glob("*/train-00000.uint16")
    content = bytearray(shard.read_bytes())
    content[100] ^= 1
    shard.write_bytes(content)
    fails([*PRETRAIN, *files("text/*.txt"), "trainer.seed=1"], 3, shard.name, str(shard.parent))


def test_weights_that_were_changed_are_not_tuned(trained, fails):
    (weights,) = Path("outputs/qwen3_tiny-pretrain").glob("*/model/model.safetensors")
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    corpus = "data.corpus={kind: files, paths: [text/*.txt], licence: PSF-2.0}"
    dpo = [*SMALL, "trainer=dpo", corpus, "data.pairs.prompt_characters=60", "data.pairs.answer_characters=40"]
    dpo.append("trainer.sequence_tokens=128")
    fails(dpo, 3, str(weights.parent))
    fails([*dpo, "trainer.init_from=qwen3_tiny-pretrain@1.0.0"], 3, str(weights.parent))
    fails([*dpo, f"trainer.init_from={weights.parent.parent}"], 3, str(weights.parent))
