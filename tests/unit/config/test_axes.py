"""What a search varies."""

from pathlib import Path

import pytest

from llmtrain.config.axes import Choices, Interval
from llmtrain.config.compose import load_search
from llmtrain.errors import ConfigError

LR = "trainer.lr=tag(log,interval(1e-4,1e-2))"


def test_a_grid_is_no_search():
    assert load_search(["trainer.lr=1e-4,3e-4"]) is None


def test_axes_are_what_hydra_sweeps_over():
    lines = ["sweep=tpe", LR, "model=qwen3_tiny,qwen3_small", "trainer.batch_rows=range(2,7,2)"]
    lines += [
        "trainer.weight_decay=interval(0,1)",
        "trainer.sample_tokens=int(interval(1,8))",
        "trainer.adam_beta1=0.8",
    ]
    found = load_search(lines)
    assert found is not None
    space, points = found
    assert space.fixed == ("sweep=tpe", "trainer.adam_beta1=0.8")
    assert space.axes == (
        Interval(key="trainer.lr", low=1e-4, high=1e-2, log=True, whole=False),
        Choices(key="model", values=("qwen3_tiny", "qwen3_small"), ordered=False),
        Choices(key="trainer.batch_rows", values=("2", "4", "6"), ordered=True),
        Interval(key="trainer.weight_decay", low=0, high=1, log=False, whole=False),
        Interval(key="trainer.sample_tokens", low=1, high=8, log=False, whole=True),
    )
    assert {config.trainer.lr for _, config in points} == {1e-4, 1e-2}, "both ends"
    assert {config.model.name for _, config in points} == {"qwen3_tiny", "qwen3_small"}
    assert {config.trainer.batch_rows for _, config in points} == {2, 4, 6}
    assert len(points) == 1 + 1 + 1 + 2 + 1 + 1, "one axis at a time: the first, and each other option and end"


def test_few_axes_are_checked_in_every_combination():
    found = load_search(["sweep=tpe", LR, "model=qwen3_tiny,qwen3_small"])
    assert found is not None
    assert {(config.trainer.lr, config.model.name) for _, config in found[1]} == {
        (lr, name) for lr in (1e-4, 1e-2) for name in ("qwen3_tiny", "qwen3_small")
    }


@pytest.mark.parametrize(("value", "text"), [(0.00123456789, "0.00123457"), (0.0099999999, "0.01"), (1.0, "0.01")])
def test_a_number_is_given_short_and_between_the_ends(value: float, text: str):
    assert Interval(key="lr", low=1e-4, high=0.01, log=True, whole=False).text(value) == text


@pytest.mark.parametrize(
    ("lines", "problem"),
    [
        (["trainer.lr=interval(-1,1)"], "trainer.lr: got -1.0, wants a number > 0 (override 'trainer.lr=-1.0')"),
        (
            ["trainer.batch_rows=interval(1,4)"],
            "trainer.batch_rows: wants whole numbers; write int(interval(1,4)) "
            "(override 'trainer.batch_rows=interval(1,4)')",
        ),
        (
            ["trainer.seed=0,1"],
            "trainer.seed: a search does not look for the best seed; write 'sweep.seeds=[0,1]': each point runs with "
            "all (override 'trainer.seed=0,1')",
        ),
        (
            ["trainer.lr=tag(logarithm,interval(1,2))"],
            "trainer.lr: tag 'logarithm' means nothing here; write tag(log,interval(LOW,HIGH)) "
            "(override 'trainer.lr=tag(logarithm,interval(1,2))')",
        ),
        (["trainer.lr=interval(2,1)"], "trainer.lr: the interval is empty; write interval(LOW,HIGH) "
                                       "(override 'trainer.lr=interval(2,1)')"),
        ([], "sweep: a search needs something to vary: KEY=A,B or KEY=interval(LOW,HIGH)"),
        (["sweep.trials=1,2"], "sweep.trials: belongs to the whole sweep; give it one value "
                               "(override 'sweep.trials=1,2')"),
    ],
)  # fmt: skip
def test_what_cannot_be_searched_is_refused(lines: list[str], problem: str):
    with pytest.raises(ConfigError) as error:
        load_search(["sweep=tpe", *lines])
    assert error.value.problems == [problem]


def test_each_option_is_checked():
    with pytest.raises(ConfigError, match=r"no option 'qwen3_tny'; did you mean 'qwen3_tiny'"):
        load_search(["sweep=tpe", LR, "model=qwen3_small,qwen3_tny"])


def test_money_needs_a_price_and_rungs_an_evaluation():
    with pytest.raises(ConfigError, match=r"sweep.budget_usd needs a price: set infra.hardware.price_per_hour"):
        load_search(["sweep=tpe", LR, "sweep.budget_usd=1"])
    with pytest.raises(ConfigError, match=r"sweep.rung_tokens=100 comes before the first evaluation"):
        load_search(["sweep=asha", LR, "sweep.rung_tokens=100"])


def test_a_search_without_m_is_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch):
    from llmtrain.cli.train import main

    monkeypatch.chdir(tmp_path)
    assert main(["sweep=tpe"]) == 2
    assert "sweep=tpe proposes points: add -m" in capsys.readouterr().err
    assert main(["-m", "sweep=tpe", "--again", LR]) == 2
    assert "--again goes with runs and grids" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
