"""What `-m` makes of a command line."""

import pytest
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser

from llmtrain.config.compose import expand_sweep, load_sweep
from llmtrain.errors import ConfigError


@pytest.mark.parametrize(
    "line",
    [
        ["trainer.lr=1e-4,3e-4", "trainer.seed=1,2"],
        ["trainer.seed=choice(1,5)", "model=qwen3_tiny"],
        ["trainer.seed=range(0,3)"],
        ["model=qwen3_tiny,qwen3_small", "trainer.lr=range(0.1,0.3,0.1)"],
        ["trainer.lr=1e-4,3e-4", "trainer.lr=5e-4"],
    ],
)
def test_points_are_those_of_hydras_own_sweeper(line: list[str]):
    parsed = OverridesParser.create().parse_overrides(line)
    values = [[override.split("=") for override in point] for point in BasicSweeper.split_arguments(parsed, None)[0]]
    ours = [[override.split("=") for override in point] for point in expand_sweep(line)]
    assert [[key for key, _ in point] for point in ours] == [[key for key, _ in point] for point in values]
    assert [[_number(value) for _, value in point] for point in ours] == [
        [_number(value) for _, value in point] for point in values
    ]


def _number(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text


def test_a_glob_takes_options_and_not_what_they_inherit():
    points = expand_sweep(["model=glob(qwen3_*,exclude=qwen3_*b)"])
    assert points == [["model=qwen3_characters"], ["model=qwen3_small"], ["model=qwen3_tiny"]]


def test_each_point_has_its_config():
    sweep = load_sweep(["trainer.seed=1,2", "model=qwen3_tiny"])
    assert [(point[0], config.trainer.seed, config.model.name) for point, config in sweep] == [
        ("trainer.seed=1", 1, "qwen3_tiny"),
        ("trainer.seed=2", 2, "qwen3_tiny"),
    ]


def test_problems_of_all_points_are_told_once():
    with pytest.raises(ConfigError) as error:
        expand_sweep(["trainer.lr=1e-4,fast,slow", "trainer.sed=1", "trainer.seed=1,2"])
    assert error.value.problems == [
        "trainer.sed: no such setting; did you mean 'trainer.seed'? (override 'trainer.sed=1')",
        "trainer.lr: got 'fast', wants a number > 0 (override 'trainer.lr=fast')",
        "trainer.lr: got 'slow', wants a number > 0 (override 'trainer.lr=slow')",
    ]


@pytest.mark.parametrize(
    ("override", "reason"),
    [
        ("trainer.lr=interval(0,1)", "an interval has no points to try; write choice(...) or range(...)"),
        ("model=glob(gpt*)", "the sweep has no values"),
        ("trainer.seed=range(3,0)", "the sweep has no values"),
    ],
)
def test_a_sweep_without_points_is_refused(override: str, reason: str):
    with pytest.raises(ConfigError) as error:
        expand_sweep([override])
    assert error.value.problems == [f"{override.partition('=')[0]}: {reason} (override '{override}')"]
