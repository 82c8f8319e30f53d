import pytest

from llmtrain.training.schedule import due, learning_rate


def rate(tokens: int) -> float:
    return learning_rate(tokens, peak=1.0, warmup_tokens=100, total_tokens=1100, min_share=0.1)


def test_learning_rate_rises_linearly_and_falls_by_half_a_cosine():
    assert rate(25) == 0.25
    assert rate(100) == 1.0
    assert rate(600) == pytest.approx(0.55)  # half way: the mean of peak and floor
    assert rate(350) == pytest.approx(0.1 + 0.9 * (1 + 0.5**0.5) / 2)  # a quarter: cos 45 degrees
    assert rate(1100) == pytest.approx(0.1)
    assert rate(5000) == pytest.approx(0.1)


def test_without_warmup_it_starts_at_the_peak():
    assert learning_rate(0, peak=2.0, warmup_tokens=0, total_tokens=10, min_share=0.0) == 2.0


def test_an_event_is_due_when_a_multiple_is_reached_or_crossed():
    assert not due(0, 99, 100)
    assert due(0, 100, 100)
    assert due(99, 101, 100)
    assert not due(100, 199, 100)
    assert due(150, 950, 100)
