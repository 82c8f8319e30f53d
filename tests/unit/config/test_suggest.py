"""Which name was meant: facts about the distance. Every name of conf/ misspelt: tests/conf/test_misspelt.py."""

import pytest

from llmtrain.config.root import TrainConfig
from llmtrain.config.schema import settings
from llmtrain.config.suggest import ELSEWHERE, closest, did_you_mean, distance

KEYS = ["trainer.lr", "trainer.seed", "trainer.warmup_tokens", "model.vocab_size", "model.tokenizer.vocab_size"]


@pytest.mark.parametrize(
    ("first", "second", "edits"),
    [
        ("lr", "lr", 0),
        ("", "lr", 2),
        ("warmup", "warmp", 1),
        ("warmup", "waarmup", 1),
        ("warmup", "wramup", 1),
        ("warmup", "warmop", 1),
        ("kitten", "sitting", 3),
        ("ca", "abc", 3),  # a swapped pair is not edited again: the unrestricted distance would be 2
    ],
)
def test_distance_counts_edits(first: str, second: str, edits: int):
    assert distance(first, second) == distance(second, first) == edits


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("trainer.sede", ["trainer.seed"]),
        ("trainr.lr", ["trainer.lr"]),
        ("model.lr", ["trainer.lr"]),
        ("lr", ["trainer.lr"]),
        ("trainer.warmup", ["trainer.warmup_tokens"]),
        ("data.vocab_size", ["model.vocab_size", "model.tokenizer.vocab_size"]),
        ("completely.different", []),
    ],
)
def test_closest_finds_what_was_meant(typed: str, meant: list[str]):
    assert closest(typed, KEYS) == meant


def test_did_you_mean_names_at_most_three():
    assert did_you_mean([]) == ""
    assert did_you_mean(["a"]) == "; did you mean 'a'?"
    assert did_you_mean(["a", "b", "c", "d"]) == "; did you mean 'a' or 'b' or 'c'?"


def test_names_from_elsewhere_lead_to_settings_that_there_are():
    known = [".".join(setting.key) for setting in settings(TrainConfig)]
    assert {name for names in ELSEWHERE.values() for name in names} <= set(known)
    assert closest("trainer.learning_rate", known) == ["trainer.lr"]
    assert closest("max_steps", known) == ["trainer.budget_tokens", "trainer.epochs"]
    assert not ELSEWHERE.keys() & {name.rpartition(".")[2] for name in known}
