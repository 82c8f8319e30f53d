"""What `-m` makes of a command line."""

import pytest
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser

from llmtrain.config.compose import Composer, expand_sweep, load_sweep
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
        (
            "trainer.lr=interval(0,1)",
            "a grid cannot try every number of an interval; write choice(...) or range(...), "
            "or search it: sweep=tpe or sweep=asha",
        ),
        ("model=glob(gpt*)", "the sweep has no values"),
        ("trainer.seed=range(3,0)", "the sweep has no values"),
    ],
)
def test_a_sweep_without_points_is_refused(override: str, reason: str):
    with pytest.raises(ConfigError) as error:
        expand_sweep([override])
    assert error.value.problems == [f"{override.partition('=')[0]}: {reason} (override '{override}')"]


@pytest.mark.parametrize(
    "line",
    [
        ["trainer.lr=3e-4", "trainer=dpo", "trainer.loss=ipo", "model=qwen3_tiny"],
        ["experiment=smoke", "trainer.budget_tokens=5_000", "data.corpus.modules=[json,re]"],
        ["tracking=comet", "tracking.kind=none"],
        ["model.tokenizer={kind: hf, path: somewhere}", "+trainer.lr=1"],
        ["~experiment", "name=${model.name}-x", "infra=slurm", "infra.ranks=3", "infra.launch.nodes=2"],
        ["trainer.lr=fast", "trainer.warmup_token=3", "model=qwen3_smal", "zzz=1", "trainer={lr: 2, sed: 1}"],
        ["outputs_dir=???", "infra.launch.kind=slurm", "environment=prod"],
        ["trainer.lr=[1", "model=hf", "data=text_files"],
        ["hydra.searchpath=[file://nowhere]"],
    ],
)
def test_what_is_kept_from_point_to_point_changes_no_answer(line: list[str]):
    kept, fresh = Composer(files_stay=True), Composer()

    def answer(composer: Composer) -> object:
        try:
            checked = composer.check(line)
        except ConfigError as error:
            return error.problems
        chains = {key: [str(origin) for origin in chain] for key, chain in checked.origins().chains.items()}
        return checked.config, [str(problem) for problem in checked.problems], checked.data, checked.open_keys, chains

    expected = answer(fresh)
    assert answer(kept) == expected
    assert answer(kept) == expected, "the first answer did not change what is kept"
