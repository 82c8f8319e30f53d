"""A change of a YAML file shows in tests/golden; `scripts/golden` rewrites it."""

import json
from pathlib import Path

import pytest

from llmtrain.config.compose import load_config

GOLDEN = Path(__file__).parents[1] / "golden"


@pytest.mark.parametrize("path", sorted(GOLDEN.glob("*.json")), ids=lambda path: path.stem)
def test_pinned_command_line_still_composes_to_the_pinned_config(path: Path):
    pinned = json.loads(path.read_text())
    composed = load_config(pinned["overrides"]).model_dump(mode="json")
    assert composed == pinned["config"], "if this change is meant, run scripts/golden and commit what it writes"


def test_default_dpo_smoke_and_a_large_model_are_pinned():
    pinned = [json.loads(path.read_text())["overrides"] for path in GOLDEN.glob("*.json")]
    for overrides in ([], ["trainer=dpo"], ["experiment=smoke"], ["model=qwen3_0_6b", "infra=local_gpu"]):
        assert overrides in pinned
