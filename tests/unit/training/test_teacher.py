"""What is kept of a teacher is right, is found again, and is made anew where it is wrong."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from llmtrain.config.compose import load_config
from llmtrain.errors import UserError
from llmtrain.files import sha256_of
from llmtrain.models.attention import generating
from llmtrain.training import teacher, teacher_store
from llmtrain.training.divergences import top_k
from llmtrain.training.teacher import Text, student_figures, teacher_rows, unigram_divergence

VOCABULARY, SEQUENCE = 512, 16


@pytest.fixture
def config():
    return load_config(
        ["model=qwen3_tiny", "trainer=distill", "trainer.teacher=t@1.0.0", "infra.precision=fp32",
         "infra.micro_batch_tokens=40", "infra.loss_chunk_tokens=7", f"trainer.sequence_tokens={SEQUENCE}",
         "trainer.teacher_top_k=4", "trainer.temperature=1.5"]
    )  # fmt: skip


@pytest.fixture
def texts(shards) -> dict[str, Text]:
    """Some rows to train on, and all rows: 248 tokens are 15 rows of 16, and one of 7."""
    return {"train": Text(shards, SEQUENCE, [1, 4, 5, 11]), "test": Text(shards, SEQUENCE, None)}


@pytest.fixture
def ask(network, texts, config, tmp_path: Path):
    def asking(weights_sha256: str = "w", **changes: object):
        trainer = config.trainer.model_copy(update=changes)
        return teacher_rows(
            lambda: network, texts, trainer, vocab_size=VOCABULARY, weights_sha256=weights_sha256, text_sha256="t",
            infra=config.infra, outputs=tmp_path, progress=lambda num_targets: None,
        )  # fmt: skip

    return asking


def count_rows(monkeypatch) -> list[int]:
    """The number of rows of each pass of the teacher."""
    calls: list[int] = []
    honest = Text.packed

    def counted(text, rows, infra):
        calls.append(len(rows))
        return honest(text, rows, infra)

    monkeypatch.setattr(Text, "packed", counted)
    return calls


def logits_of(network, shards, row: int) -> torch.Tensor:
    start = row * SEQUENCE
    ids = torch.from_numpy(shards.tokens(start, min(start + SEQUENCE + 1, shards.num_tokens)))[None, :-1]
    with generating(network), torch.no_grad():
        return network(input_ids=ids, use_cache=False).logits[0]


def test_each_target_has_what_transformers_logits_say(ask, network, shards, monkeypatch):
    monkeypatch.setattr(teacher_store, "SHARD_TARGETS", 50)  # rows go on in the next shard
    known = ask()
    assert known["train"].num_targets == 4 * 16
    assert known["test"].num_targets == 247 == shards.num_tokens - 1
    for split, rows in (("train", [11, 1, 5]), ("test", [15, 0, 3, 14])):
        found = known[split].of(rows, "cpu")
        right = [top_k(logits_of(network, shards, row), 4, 1.5) for row in rows]
        assert torch.equal(found.ids, torch.cat([part.ids for part in right]))
        difference = (found.log_probs.float() - torch.cat([part.log_probs for part in right])).abs().max()
        assert difference < 5e-3, "fp16, of ln p near -6: steps of 2^-8"


def test_the_files_are_small_and_of_fixed_types(ask, tmp_path):
    ask()
    sizes = {path.name: path.stat().st_size for path in tmp_path.glob("teacher/*/*") if path.name != "sha256"}
    assert sizes["train.log_probs-00000.float16"] == 64 * 5 * 2
    assert sizes["train.ids-00000.uint16"] == 64 * 4 * 2
    assert sizes["test.ids-00000.uint16"] == 247 * 4 * 2
    assert list(tmp_path.glob("teacher/*.writing")) == []


def test_a_row_that_the_teacher_was_not_asked_about_is_an_error(ask):
    with pytest.raises(AssertionError, match="not asked about row 2"):
        ask()["train"].of([2], "cpu")


def test_the_second_time_only_the_spot_check_is_computed(ask, monkeypatch):
    calls = count_rows(monkeypatch)
    first, second = ask(), ask()
    assert calls == [2, 2, *[2] * 8, 2, 2], "of training and test two rows each"
    assert torch.equal(first["test"].of([3], "cpu").log_probs, second["test"].of([3], "cpu").log_probs)


@pytest.mark.parametrize("change", [{"weights_sha256": "v"}, {"temperature": 1.0}, {"teacher_top_k": 5}])
def test_another_question_has_another_place(ask, change, tmp_path):
    ask()
    ask(**change)
    assert len(list(tmp_path.glob("teacher/*/sha256"))) == 2


@pytest.mark.parametrize("damage", ["one bit", "bytes", "missing", "no hashes", "another teacher's"])
def test_a_store_that_is_wrong_is_made_anew(ask, damage, tmp_path, capsys):
    right = ask()["train"].of([1, 4], "cpu")
    right = right.log_probs.clone()
    (file,) = tmp_path.glob("teacher/*/train.log_probs-00000.float16")
    hashes = file.parent / "sha256"
    match damage:
        case "one bit":
            content = bytearray(file.read_bytes())
            content[-1] ^= 1
            file.write_bytes(content)
        case "bytes":
            file.write_bytes(file.read_bytes()[:50])
        case "missing":
            file.unlink()
        case "no hashes":
            hashes.unlink()
        case "another teacher's":  # whole, but not what this teacher says
            values = np.fromfile(file, dtype="<f2").reshape(-1, 5)
            values[:, ::-1].tofile(file)
            hashes.write_text(json.dumps(json.loads(hashes.read_text()) | {file.name: sha256_of(file)}))
    assert torch.equal(ask()["train"].of([1, 4], "cpu").log_probs, right)
    assert "computing it anew" in capsys.readouterr().err
    ask()
    assert capsys.readouterr().err == ""


def test_a_kill_while_it_is_made_leaves_nothing_that_is_used(ask, tmp_path, monkeypatch):
    def killed(directory):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(teacher, "write_hashes", killed)
        with pytest.raises(KeyboardInterrupt):
            ask()
    assert list(tmp_path.glob("teacher/*/")) == []
    assert ask()["train"].num_targets == 64


def test_more_than_the_vocabulary_is_refused(ask):
    with pytest.raises(UserError, match=r"teacher_top_k=512 is not less .* set trainer.teacher_top_k=511"):
        ask(teacher_top_k=512)


def test_figures_of_the_teacher_itself_are_its_loss_and_no_divergence(ask, network, shards, texts, config):
    known = ask()["test"]
    found, num_targets = student_figures(network, texts["test"], known, config.trainer, config.infra)
    losses = []
    for row in range(16):
        log_probs = logits_of(network, shards, row).log_softmax(1)
        targets = torch.from_numpy(shards.tokens(row * 16 + 1, min(row * 16 + 17, shards.num_tokens)))
        losses.append(-log_probs.gather(1, targets[:, None]).squeeze(1))
    assert num_targets == 247
    assert found["heldout_loss"] == pytest.approx(torch.cat(losses).mean().item(), rel=1e-5)
    assert abs(found["divergence"]) < 1e-5  # rounding may take it below 0
    share = config.trainer.ce_weight
    assert found["loss"] == share * found["heldout_loss"] + (1 - share) * found["divergence"]


def test_a_unigram_models_divergence_by_hand(shards, config, tmp_path):
    # of 8 entries one has been seen 7 times more than each other: 8/15 against 1/15; the teacher says 1/2 and all else
    trainer = config.trainer.model_copy(update={"temperature": 1.0, "teacher_top_k": 1})
    text = Text(shards, SEQUENCE, [0])
    writer = teacher_store.Writer(tmp_path, "test", text.rows, 8)
    half = torch.full((16, 2), math.log(0.5))
    writer.append(teacher_store.TopK(half, torch.zeros(16, 1, dtype=torch.int64)))
    known = teacher_store.TeacherRows(tmp_path, "test", 1, SEQUENCE)
    found = unigram_divergence(np.array([7, *[0] * 7]), text, known, trainer, config.infra)
    assert found == pytest.approx(0.5 * math.log(0.5 * 15 / 8) + 0.5 * math.log(0.5 * 15 / 7), rel=1e-4)
