"""Phases add up: what is inside another is counted once."""

import time

import pytest

from llmtrain.telemetry.stopwatch import Stopwatch


@pytest.fixture
def clock(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    return now


def test_a_phase_inside_another_is_not_counted_to_the_outer_one(clock):
    stopwatch = Stopwatch()
    with stopwatch.phase("training"):
        clock[0] += 5
        with stopwatch.phase("evaluation"):
            clock[0] += 2
        clock[0] += 1
    clock[0] += 50  # outside of any phase
    with stopwatch.phase("training"):
        clock[0] += 4
        assert stopwatch.seconds == {"training": 10.0, "evaluation": 2.0}


def test_a_phase_that_ends_in_an_error_is_counted_and_closed(clock):
    stopwatch = Stopwatch()

    def fails():
        with stopwatch.phase("export"):
            clock[0] += 3
            raise OSError("no room")

    with pytest.raises(OSError, match="no room"):
        fails()
    clock[0] += 9
    assert stopwatch.seconds == {"export": 3.0}


def test_a_clock_that_is_set_back_takes_no_time_away(clock):
    stopwatch = Stopwatch()
    with stopwatch.phase("training"):
        clock[0] += 8
        assert stopwatch.seconds == {"training": 8.0}
        clock[0] -= 86_400
        assert stopwatch.seconds == {"training": 8.0}
        clock[0] += 2
    assert stopwatch.seconds == {"training": 10.0}
