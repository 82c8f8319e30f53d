"""Geometry: where values stand in a picture."""

import math

import pytest

from llmtrain.report.charts import BOTTOM, LEFT, MOST_POINTS, RIGHT, TOP, Axis, curve_chart, histogram, short


@pytest.mark.parametrize(
    ("value", "words"),
    [(0, "0"), (0.1234567, "0.1235"), (2e-5, "2e-5"), (1500, "1.5k"), (1_234_567, "1.235M"), (-3e9, "-3B")],
)
def test_numbers_are_short(value: float, words: str):
    assert short(value) == words


@pytest.mark.parametrize("high", [2999.9999999999995, 0.29999999999999993])  # a third's logarithm is rounded up
def test_an_axis_just_below_a_round_width_has_ticks(high):
    assert len(Axis(0.0, high, 0, 100).ticks) == 3


def test_an_axis_has_round_ticks_inside_it():
    assert Axis(0, 10, 0, 100).ticks == [(0, "0"), (20, "2"), (40, "4"), (60, "6"), (80, "8"), (100, "10")]
    assert [label for _, label in Axis(5.41, 6.97, BOTTOM, TOP).ticks] == ["5.5", "6", "6.5"]
    for exponent in range(-6, 9):
        for high in (1, 1.5, 2, 3, 4.9, 5, 7, 9.99):
            ticks = Axis(0, high * 10**exponent, 0, 1).ticks
            assert 3 <= len(ticks) <= 8
            assert len({label for _, label in ticks}) == len(ticks)


def test_curves_stand_where_their_values_are():
    rows = [{"tokens": tokens, "train/loss": loss} for tokens, loss in ((0, 2.0), (50, 1.0), (100, 0.0))]
    chart = curve_chart("Loss", "nats", rows, ("train/loss", "validation/loss"), {"chance": 1.0})
    assert chart is not None
    (curve,) = chart.curves
    middle = (BOTTOM + TOP) / 2
    assert chart.levels == [(middle, "chance", "1")]
    (points,) = curve.lines
    (first_x, first_y), (x, y), (last_x, last_y) = (map(float, point.split(",")) for point in points.split())
    assert (first_x, x, last_x) == (LEFT, (LEFT + RIGHT) / 2, RIGHT)
    assert y == middle
    assert TOP < first_y < y < last_y < BOTTOM


def test_an_undefined_value_breaks_the_curve():
    losses = (3.0, 2.0, math.nan, math.inf, 1.0)
    rows = [{"tokens": tokens, "train/loss": loss} for tokens, loss in enumerate(losses)]
    chart = curve_chart("Loss", "", rows, ("train/loss",), {})
    assert chart is not None
    assert [len(line.split()) for line in chart.curves[0].lines] == [2, 1]


def test_a_panel_without_a_finite_value_is_left_out():
    assert curve_chart("Loss", "", [], ("train/loss",), {"chance": 1.0}) is None
    assert curve_chart("Loss", "", [{"tokens": 1, "train/loss": math.nan}], ("train/loss",), {}) is None


def test_a_long_run_is_thinned_and_keeps_its_peak():
    rows = [{"tokens": tokens, "train/loss": 1.0 + (tokens == 54_321)} for tokens in range(100_000)]
    chart = curve_chart("Loss", "", rows, ("train/loss",), {})
    assert chart is not None
    points = [point.split(",") for point in chart.curves[0].lines[0].split()]
    assert len(points) <= MOST_POINTS + 2
    peak = min(points, key=lambda point: float(point[1]))
    assert float(peak[0]) == pytest.approx(LEFT + (RIGHT - LEFT) * 0.54321, abs=0.1)
    assert float(peak[1]) == chart.y.place(2.0)


def test_standard_errors_are_bars_inside_the_picture():
    rows = [{"tokens": 1, "validation/accuracy": 0.6, "validation/accuracy_se": 0.1}]
    chart = curve_chart("Accuracy", "", rows, ("validation/accuracy",), {})
    assert chart is not None
    assert chart.curves[0].bars == [(RIGHT, chart.y.place(0.5), chart.y.place(0.7))]
    assert TOP < chart.y.place(0.7) < chart.y.place(0.5) < BOTTOM


def test_a_histogram_shows_shares_of_each_set():
    chart = histogram({"before": [0.0] * 10, "after": [0.0, 1.0, 1.0, 1.0]}, num_bins=2)
    assert chart is not None
    heights = {}
    for name, outline in chart.outlines:
        corners = [tuple(map(float, corner.split(","))) for corner in outline.split()]
        heights[name] = [corners[1][1], corners[3][1]]
    assert heights["before"] == [chart.y.place(1.0), BOTTOM]
    assert heights["after"] == [chart.y.place(0.25), chart.y.place(0.75)]
    assert chart.zero == LEFT


def test_a_histogram_of_nothing_is_none_and_of_one_value_is_a_bar():
    assert histogram({"after": []}) is None
    assert histogram({"after": [math.nan]}) is None
    chart = histogram({"after": [3.0]})
    assert chart is not None
    assert (chart.x.low, chart.x.high) == (2.0, 4.0)
