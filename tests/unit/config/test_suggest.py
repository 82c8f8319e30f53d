"""Which name was meant: facts about the distance, and every setting of the default config misspelled."""

import random
import string

import pytest

from llmtrain.config.compose import Composer, load_config
from llmtrain.config.suggest import closest, did_you_mean, distance

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


def leaves(values: dict, prefix: str = "") -> list[str]:
    return [
        leaf
        for name, value in values.items()
        for leaf in (leaves(value, f"{prefix}{name}.") if isinstance(value, dict) else [prefix + name])
    ]


def misspelled(word: str, rng: random.Random) -> list[str]:
    """One letter dropped, doubled, swapped with the next, and replaced."""
    letters = [i for i, letter in enumerate(word) if letter.isalpha()]
    drop, double, replace = rng.choices(letters, k=3)
    swap = rng.choice([i for i in letters[:-1] if word[i] != word[i + 1]])
    other = rng.choice([letter for letter in string.ascii_lowercase if letter != word[replace]])
    return [
        word[:drop] + word[drop + 1 :],
        word[:double] + word[double] + word[double:],
        word[:swap] + word[swap + 1] + word[swap] + word[swap + 2 :],
        word[:replace] + other + word[replace + 1 :],
    ]


def test_at_least_95_percent_of_misspelled_settings_are_named_right():
    rng = random.Random(20250101)
    settings = leaves(load_config([]).model_dump(mode="json"))
    pairs = [(wrong, key) for key in settings for _ in range(2) for wrong in misspelled(key, rng)]
    pairs = [(wrong, key) for wrong, key in dict(pairs).items() if wrong not in settings]
    sample = rng.sample(pairs, 300)
    composer = Composer()
    right = 0
    for start in range(0, len(sample), 20):  # twenty mistakes on one command line: all of them must be told
        some = sample[start : start + 20]
        problems = {
            problem.key: problem.text for problem in composer.check([f"{wrong}=1" for wrong, _ in some]).problems
        }
        assert {wrong for wrong, _ in some} <= problems.keys()
        right += sum(problems[wrong].startswith(f"no such setting; did you mean '{key}'") for wrong, key in some)
    assert right / len(sample) >= 0.95, f"{right} of {len(sample)}"
