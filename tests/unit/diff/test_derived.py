"""Derived quantities against values found by hand."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llmtrain.config.compare import Side, composed
from llmtrain.config.compose import Composer
from llmtrain.diff import derived as module
from llmtrain.diff.derived import derived

SideOf = Callable[..., Side]
TEN_STEPS = ("trainer.batch_rows=10", "trainer.sequence_tokens=100", "trainer.budget_tokens=10_999",
             "trainer.warmup_tokens=2_000", "trainer.min_lr_share=0", "trainer.lr=1e-3")  # fmt: skip


@pytest.fixture
def side(tmp_path: Path) -> SideOf:
    composer = Composer()
    return lambda *words: composed("", composer.check([f"outputs_dir={tmp_path}", "model=qwen3_tiny", *words]))


def figures(before: Side, after: Side) -> dict[str, tuple[Any, Any]]:
    return {one.name: (one.before, one.after) for one in derived(before, after).quantities}


def test_steps_and_tokens(side: SideOf, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "counted", lambda *_: {})
    found = figures(side(*TEN_STEPS), side(*TEN_STEPS, "trainer.batch_rows=30"))
    assert found["tokens per step"] == (10 * 100, 30 * 100)
    assert found["steps"] == (10, 3)  # 10,999 tokens are 10.9 steps of 1,000 and 3.6 of 3,000
    assert found["tokens"] == (10_000, 9_000)


def test_the_learning_rate_at_ten_points(side: SideOf):
    found = figures(
        side(*TEN_STEPS, "trainer.schedule=constant"),
        side(*TEN_STEPS, "trainer.schedule=wsd", "trainer.decay_share=0.2"),
    )
    assert list(found) == ["learning rate"]
    constant, wsd = found["learning rate"]
    assert constant == pytest.approx((5e-4, *[1e-3] * 9))  # half of the warm-up, then the peak
    assert wsd == pytest.approx((5e-4, *[1e-3] * 7, 5e-4, 0))  # over the last two of ten points it falls to nothing


def test_a_cosine_is_half_way_down_in_the_middle(side: SideOf):
    words = (*TEN_STEPS, "trainer.warmup_tokens=0")
    _, cosine = figures(side(*words, "trainer.schedule=constant"), side(*words))["learning rate"]
    assert (cosine[4], cosine[9]) == pytest.approx((5e-4, 0))


def test_parameters_and_flops_of_one_more_layer(side: SideOf):
    before, after = side(*TEN_STEPS), side(*TEN_STEPS, "model.num_hidden_layers=3")
    found = figures(before, after)
    model: Any = before.config.model
    assert (model.num_hidden_layers, model.hidden_size, model.tie_word_embeddings) == (2, 64, True)
    attention = 64 * model.head_dim * (2 * model.num_attention_heads + 2 * model.num_key_value_heads)
    matrices = attention + 3 * 64 * model.intermediate_size
    norms = 2 * 64 + 2 * model.head_dim  # before attention and feed-forward; of queries and of keys
    old, new = found["parameters"]
    assert new - old == matrices + norms
    half, full = found["FLOPs, causal half"], found["FLOPs, causal in full"]
    pairs = 100 * 100 * 100  # 100 rows of 100 tokens, each with each
    seen = 3 * 4 * model.num_attention_heads * model.head_dim * pairs  # forward, and twice as much backward
    linear = 3 * 2 * matrices * 10_000
    assert half[1] - half[0] == pytest.approx(linear + seen / 2)
    assert full[1] - full[0] == pytest.approx(linear + seen)


def test_what_cannot_change_the_counts_is_not_traced(side: SideOf, monkeypatch: pytest.MonkeyPatch):
    def traced(*_: object) -> dict[str, Any]:
        raise AssertionError("it waits seconds for torch")

    monkeypatch.setattr(module, "counted", traced)
    words = ["infra.micro_batch_tokens=512", "infra.ranks=2", "trainer.weight_decay=0", "name=x"]
    assert figures(side(*TEN_STEPS), side(*TEN_STEPS, *words)) == {}


def test_tuning_is_not_known_before_its_data_are_prepared(side: SideOf, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "counted", lambda *_: {})
    found = figures(side(), side("trainer=dpo"))
    assert found["steps"] == (600_000 // 512, None)
    assert found["learning rate"][1] is None


def test_a_published_model_that_is_not_here_is_said(side: SideOf, tmp_path: Path):
    published = ("trainer=dpo", "model=hf", "model.name=x", f"model.path={tmp_path}/nothing")
    found = derived(side("trainer=dpo"), side(*published))
    assert found.not_counted is not None
    assert "parameters" not in [one.name for one in found.quantities]
