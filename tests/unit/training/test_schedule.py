from functools import partial

import pytest

from llmtrain.training.schedule import due, learning_rate

cosine = partial(learning_rate, schedule="cosine", decay_share=0.2)


def rate(tokens: int) -> float:
    return cosine(tokens, peak=1.0, warmup_tokens=100, total_tokens=1100, min_share=0.1)


def test_learning_rate_rises_linearly_and_falls_by_half_a_cosine():
    assert rate(25) == 0.25
    assert rate(100) == 1.0
    assert rate(600) == pytest.approx(0.55)  # half way: the mean of peak and floor
    assert rate(350) == pytest.approx(0.1 + 0.9 * (1 + 0.5**0.5) / 2)  # a quarter: cos 45 degrees
    assert rate(1100) == pytest.approx(0.1)
    assert rate(5000) == pytest.approx(0.1)


def test_without_warmup_it_starts_at_the_peak():
    assert cosine(0, peak=2.0, warmup_tokens=0, total_tokens=10, min_share=0.0) == 2.0


def wsd(tokens: int, warmup_tokens: int = 100, decay_share: float = 0.25) -> float:
    return learning_rate(
        tokens,
        peak=2.0,
        warmup_tokens=warmup_tokens,
        total_tokens=2000,
        min_share=0.1,
        schedule="wsd",
        decay_share=decay_share,
    )


def test_wsd_rises_stays_and_falls_linearly_over_the_last_share_of_all_tokens():
    assert wsd(50) == 1.0
    assert [wsd(tokens) for tokens in (100, 101, 800, 1500)] == pytest.approx([2.0] * 4)
    assert wsd(1750) == pytest.approx(1.1)  # half way from 2 to 0.2
    assert wsd(1625) == pytest.approx(1.55)
    assert wsd(2000) == pytest.approx(0.2)
    assert wsd(5000) == pytest.approx(0.2)


def test_wsd_that_falls_all_the_way_begins_when_the_warmup_is_over():
    assert wsd(400, warmup_tokens=400, decay_share=1.0) == pytest.approx(2.0)
    assert wsd(1200, warmup_tokens=400, decay_share=1.0) == pytest.approx(1.1)
    assert wsd(0, warmup_tokens=0, decay_share=1.0) == pytest.approx(2.0)


def test_constant_stays_at_the_peak_after_the_warmup():
    rates = [
        learning_rate(
            tokens,
            peak=3.0,
            warmup_tokens=100,
            total_tokens=1000,
            min_share=0.1,
            schedule="constant",
            decay_share=0.2,
        )
        for tokens in (50, 100, 999, 2000)
    ]
    assert rates == pytest.approx([1.5, 3.0, 3.0, 3.0])


def test_an_event_is_due_when_a_multiple_is_reached_or_crossed():
    assert not due(0, 99, 100)
    assert due(0, 100, 100)
    assert due(99, 101, 100)
    assert not due(100, 199, 100)
    assert due(150, 950, 100)
