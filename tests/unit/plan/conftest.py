"""Planners of small configs."""

from collections.abc import Callable
from pathlib import Path

import pytest

from llmtrain.config.compose import load_config
from llmtrain.plan import machine
from llmtrain.plan.make import Planner
from llmtrain.training.planned import planner

PlannerOf = Callable[..., Planner]
TOY = ("model=qwen3_tiny", "infra.precision=fp32", "trainer.sequence_tokens=32", "trainer.batch_rows=4")


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other tests run at the same time; what is timed here need not be right."""
    monkeypatch.setattr(machine, "is_busy", lambda: False)


@pytest.fixture
def planner_of(tmp_path: Path) -> PlannerOf:
    """The planner of a command line, in a process of 500 MB."""
    return lambda *overrides: planner(load_config(list(overrides)), tmp_path / "outputs", 500_000_000)
