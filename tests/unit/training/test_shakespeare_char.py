"""`experiment=shakespeare_char` keeps the conditions of nanoGPT's example for a CPU."""

from pathlib import Path

import pytest

from llmtrain.config.compose import load_config
from llmtrain.config.root import TrainConfig
from llmtrain.data.text import TokenShards
from llmtrain.errors import TokenizerMismatch
from llmtrain.models.build import parameter_counts
from llmtrain.training.batches import TextSteps
from llmtrain.training.resolve import resolve

LENGTH = 1_115_394
"""Characters of tiny Shakespeare."""


def config_of(text: Path, *overrides: str) -> TrainConfig:
    return load_config(["experiment=shakespeare_char", f"data.corpus.paths=[{text}]", *overrides])


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """As long as tiny Shakespeare, and with as many different characters."""
    path = tmp_path / "input.txt"
    path.write_text("".join(chr(33 + (position + position // 65) % 65) for position in range(LENGTH)))
    return path


def refuse_to_train() -> None:
    raise AssertionError("no base model is needed")


def test_0_80_million_parameters_within_2_percent():
    # embedding 128 * 128, counted once (tied); a block: q, k, v, o 128 * 128 each, feed-forward 3 * 128 * 344, norms
    # 128 + 128 and per head 32 + 32; one norm of 128 at the end
    block = 4 * 128 * 128 + 3 * 128 * 344 + 2 * 128 + 2 * 32
    total, _ = parameter_counts(config_of(Path("input.txt")).model)
    assert total == 128 * 128 + 4 * block + 128
    assert total == pytest.approx(0.80e6, rel=0.02)


def test_2000_steps_of_12_rows_with_64_targets_from_the_first_nine_tenths(text: Path, tmp_path: Path):
    config = config_of(text)
    _, inputs = resolve(config, tmp_path, train_base=refuse_to_train, say=lambda message: None)
    shards = TokenShards(tmp_path / inputs.text.path, "train")
    trainer = config.trainer
    steps = TextSteps(shards, trainer, trainer.budget_tokens, trainer.packing, config.infra)
    assert len(steps) == 2000
    assert steps.tokens_before(2000) == 2000 * 12 * 64
    (rows,) = steps[0].micro_batches
    lengths = (rows.packed.segments[:, 1] - rows.packed.segments[:, 0]).tolist()
    assert lengths == rows.packed.counts == [64] * 12  # 64 inputs and their 64 targets, as nanoGPT's block_size=64
    assert {split: counts.num_tokens - 1 for split, counts in inputs.text.splits.items()} == {
        "train": 1_003_854,
        "validation": 55_770,
        "test": 55_770,
    }


def test_a_vocabulary_without_room_for_the_characters_is_refused_before_training(text: Path, tmp_path: Path):
    with pytest.raises(TokenizerMismatch, match=r"has 67 entries, but model\.vocab_size=66: set model\.vocab_size=128"):
        resolve(config_of(text, "model.vocab_size=66"), tmp_path, train_base=refuse_to_train, say=lambda message: None)
