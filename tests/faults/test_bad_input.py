"""A user's mistakes: one message with the next step, the exit code of the design, and nothing that existed is lost."""

import json
from pathlib import Path

import pytest
import torch

from llmtrain.cli.train import main
from llmtrain.telemetry.metrics import read
from tests.faults.test_kill import text

SMALL = [
    "model=qwen3_tiny",
    "infra.precision=fp32",
    "tracking=none",
    "trainer.sequence_tokens=64",
    "trainer.batch_rows=4",
    "trainer.warmup_tokens=100",
]
PRETRAIN = [*SMALL, "trainer.budget_tokens=1_024"]


@pytest.fixture(autouse=True)
def working_directory(tmp_path: Path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def fails(capsys):
    def failing(arguments: list[str], code: int, *said: str) -> str:
        capsys.readouterr()
        assert main(arguments) == code
        error = capsys.readouterr().err
        assert "Traceback" not in error
        for part in said:
            assert part in error
        return error

    return failing


def files(pattern: str) -> list[str]:
    return ["data=text_files", f"data.corpus.paths=[{pattern}]", "data.corpus.licence=PSF-2.0"]


def jsonl(path: Path, lines: list[str]) -> list[str]:
    path.write_text("\n".join(lines) + "\n")
    return ["data=text_jsonl", f"data.corpus.paths=[{path.name}]", "data.corpus.licence=PSF-2.0"]


def test_a_missing_file_is_named(fails):
    fails([*PRETRAIN, *files("absent.txt")], 2, "absent.txt")


def test_a_glob_that_matches_nothing_is_named(fails):
    fails([*PRETRAIN, *files("notes/*.txt")], 2, "notes/*.txt")


def test_an_empty_corpus(fails):
    Path("empty.txt").write_text("")
    fails([*PRETRAIN, *files("empty.txt")], 2, "empty")


def test_a_file_that_is_not_utf8_is_named_with_the_byte(fails):
    Path("latin.txt").write_bytes("Größe".encode("latin-1"))
    fails([*PRETRAIN, *files("latin.txt")], 2, "latin.txt", "UTF-8", "2")


def test_malformed_json_lines_are_refused_with_their_numbers(fails, tmp_path):
    lines = [json.dumps({"text": f"document {number} " * 30}) for number in range(10)] + ["{broken"]
    fails([*PRETRAIN, *jsonl(tmp_path / "bad.jsonl", lines)], 2, "bad.jsonl:11", "max_refused_share")


def test_a_few_malformed_lines_are_counted_and_kept_aside(tmp_path, capsys):
    lines = [json.dumps({"text": f"{number} is a number with a document of its own. " * 20}) for number in range(60)]
    assert main([*PRETRAIN, *jsonl(tmp_path / "good.jsonl", [*lines, "{broken"])]) == 0
    (refused,) = (path for path in Path("outputs/data").glob("*/refused.jsonl") if path.read_text())
    assert "good.jsonl:61" in refused.read_text()
    assert "1" in capsys.readouterr().out


def test_preferences_that_are_wrong_are_named(fails):
    text(Path())
    Path("votes.jsonl").write_text('{"prompt": "a", "chosen": "b"}\n{"prompt": "a", "chosen": 3, "rejected": "c"}\n')
    arguments = [
        *SMALL,
        "trainer=dpo",
        "data=preference_jsonl",
        "data.pairs.paths=[votes.jsonl]",
        "data.pairs.licence=MIT",
    ]
    corpus = "data.corpus={kind: files, paths: [text/*.txt], licence: PSF-2.0}"
    fails([*arguments, corpus], 2, "votes.jsonl:1", "votes.jsonl:2")


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


def test_a_checkpoint_of_another_model_is_refused_and_the_run_it_came_from_stays(fails, capsys):
    text(Path())
    assert main([*PRETRAIN, *files("text/*.txt")]) == 0
    capsys.readouterr()
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


def test_a_second_process_on_the_same_run_is_refused(fails):
    import fcntl

    text(Path())
    assert main([*PRETRAIN, *files("text/*.txt")]) == 0
    (run,) = (path for path in Path("outputs/qwen3_tiny-pretrain").iterdir() if path.is_dir())
    with (run / "lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        fails([*PRETRAIN, *files("text/*.txt")], 75, "another process works on this run")


def test_a_flipped_bit_in_prepared_data_is_found_before_training_and_its_directory_is_named(fails):
    text(Path())
    assert main([*PRETRAIN, *files("text/*.txt")]) == 0
    (shard,) = Path("outputs/data").glob("*/train-00000.uint16")
    content = bytearray(shard.read_bytes())
    content[100] ^= 1
    shard.write_bytes(content)
    fails([*PRETRAIN, *files("text/*.txt"), "trainer.seed=1"], 3, shard.name, str(shard.parent))


def test_weights_that_were_changed_are_not_tuned(fails):
    text(Path())
    assert main([*PRETRAIN, *files("text/*.txt")]) == 0
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
