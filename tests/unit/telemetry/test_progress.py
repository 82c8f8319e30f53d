"""The progress line, on a terminal and in a log file; the clock is set by hand."""

import io

import pytest

from llmtrain.telemetry import progress
from llmtrain.telemetry.progress import Progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock(monkeypatch):
    """Seconds that `time.monotonic` shows."""
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_a_plain_line_has_share_tokens_speed_time_left_and_figures(clock):
    stream = io.StringIO()
    line = Progress(1_000_000, "pretrain", stream)
    line.update(0)
    clock[0] = 20.0
    line.update(100_000, loss=3.14159)
    assert stream.getvalue().splitlines()[1] == (
        "pretrain  10%  100k/1M tokens  5k tokens/s  3:00 left  loss 3.142"  # 900,000 tokens at 5,000 a second
    )


def test_elsewhere_a_line_comes_at_most_every_ten_seconds_and_the_last_state_always(clock):
    stream = io.StringIO()
    line = Progress(100, "dpo", stream)
    for second in range(26):
        clock[0] = float(second)
        line.update(second)
    line.done()
    shares = [text.split()[1] for text in stream.getvalue().splitlines()]
    assert shares == ["0%", "10%", "20%", "25%"]


def test_the_speed_is_that_of_the_last_half_minute(clock):
    line = Progress(10_000, "run", io.StringIO())
    tokens = 0
    for second in range(200):
        clock[0] = float(second)
        line.update(tokens)
        tokens += 1 if second < 150 else 7
    assert line.tokens_per_second() == pytest.approx(7.0)


def test_on_a_terminal_the_line_is_rewritten_within_its_width_five_times_a_second(clock, monkeypatch):
    monkeypatch.setenv("COLUMNS", "50")
    stream = Terminal()
    line = Progress(100, "dpo", stream)
    for tenth in range(21):
        clock[0] = tenth / 10
        line.update(tenth, loss=1.0)
    line.done()
    assert stream.getvalue().count("\n") == 1
    lines = stream.getvalue().removesuffix("\n").split("\r")[1:]
    assert 8 <= len(lines) <= 12  # 2 s
    assert all(len(text) <= 49 for text in lines)
    assert lines[-1].startswith("dpo ██░░░░░░░░░░  20%")


def test_a_shorter_line_wipes_a_longer_one(clock):
    stream = Terminal()
    line = Progress(100, "run", stream)
    line.update(1, loss=1.2345)
    clock[0] = 1.0
    line.update(2)
    first, second = stream.getvalue().split("\r")[1:]
    assert len(second) == len(first)
    assert "loss" not in second


def test_nothing_is_written_where_nothing_was_done():
    stream = io.StringIO()
    Progress(100, "run", stream).done()
    assert stream.getvalue() == ""


@pytest.mark.parametrize(("seconds", "text"), [(5, "0:05"), (65, "1:05"), (3725, "1:02:05")])
def test_durations(seconds, text):
    assert progress._duration(seconds) == text


def test_after_a_clock_that_jumps_back_the_speed_is_measured_anew_and_lines_go_on(clock):
    stream = io.StringIO()
    line = Progress(1_000, "run", stream)
    for second, tokens in ((100_000.0, 0), (100_010.0, 100), (10.0, 200), (20.0, 300), (30.0, 400)):
        clock[0] = second
        line.update(tokens)
    assert [shown.split("tokens  ")[1] for shown in stream.getvalue().splitlines()] == [
        "0 tokens/s  ? left", "10 tokens/s  1:30 left", "0 tokens/s  ? left", "10 tokens/s  1:10 left",
        "10 tokens/s  1:00 left",
    ]  # fmt: skip
