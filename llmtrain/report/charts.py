"""Curves and histograms as geometry: where each mark of an SVG stands. `charts.html.jinja` draws them."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

WIDTH, HEIGHT = 420, 230
LEFT, RIGHT, TOP, BOTTOM = 46, 408, 12, 200
"""Edges of the plot inside the picture, in its own units."""
MOST_POINTS = 400
"""Of a curve: more than a screen shows."""

Point = tuple[float, float]


@dataclass(frozen=True)
class Axis:
    """A linear scale from values to places, with ticks at round values."""

    low: float
    high: float
    start: float
    """Where `low` stands."""
    end: float

    def place(self, value: float) -> float:
        return round(self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start), 1)

    @property
    def ticks(self) -> list[tuple[float, str]]:
        """Place and label of three to six round values."""
        widest = (self.high - self.low) / 3 * (1 + 1e-9)  # log10 of what is just below a power of ten is rounded up
        step = 10 ** math.floor(math.log10(widest))
        step *= max(factor for factor in (1, 2, 5) if step * factor <= widest)
        first, last = math.ceil(self.low / step), math.floor(self.high / step)
        return [(self.place(number * step), short(number * step)) for number in range(first, last + 1)]


@dataclass(frozen=True)
class Curve:
    """One metric against tokens. `lines` are broken where a value is not finite."""

    name: str
    style: str
    lines: list[str]
    dots: list[tuple[float, float, str]]
    """Place and words of each measurement, where there are few enough to be seen."""
    bars: list[tuple[float, float, float]]
    """Place, lower and upper end of each standard error."""
    last: str


@dataclass(frozen=True)
class Chart:
    """A panel. `levels` are baselines: place, name and value."""

    title: str
    unit: str
    x: Axis
    y: Axis
    curves: list[Curve]
    levels: list[tuple[float, str, str]]


def short(value: float) -> str:
    """Four digits at most: 1234567 -> 1.235M, 0.000123 -> 0.000123."""
    for limit, suffix in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= limit:
            return f"{value / limit:.4g}{suffix}"
    return f"{value:.4g}".replace("e-0", "e-")


def curve_chart(
    title: str, unit: str, rows: Sequence[dict[str, Any]], keys: Iterable[str], levels: dict[str, float]
) -> Chart | None:
    """The metrics `keys` of `rows` against tokens; None where no row has a finite one."""
    series = {key: [(row["tokens"], row[key]) for row in rows if key in row] for key in keys}
    errors = {key: {row["tokens"]: row[f"{key}_se"] for row in rows if f"{key}_se" in row} for key in series}
    values = [value for points in series.values() for _, value in points if math.isfinite(value)]
    if not values:
        return None
    tokens = [tokens for points in series.values() for tokens, _ in points]
    around = [*values, *levels.values()]
    for key, points in series.items():
        finite = [(value, errors[key].get(at, 0.0)) for at, value in points if math.isfinite(value)]
        around += [value + sign * error for value, error in finite for sign in (1, -1)]
    x = Axis(0.0, float(max(*tokens, 1)), LEFT, RIGHT)
    y = _with_margin(min(around), max(around))
    curves = [_curve(key, points, errors[key], x, y) for key, points in series.items() if points]
    return Chart(title, unit, x, y, curves, [(y.place(value), name, short(value)) for name, value in levels.items()])


def _with_margin(low: float, high: float) -> Axis:
    margin = 0.06 * (high - low) or 0.1 * abs(high) or 1.0
    return Axis(low - margin, high + margin, BOTTOM, TOP)


def _curve(key: str, points: list[Point], errors: dict[float, float], x: Axis, y: Axis) -> Curve:
    lines: list[list[str]] = [[]]
    for at, value in _thinned(points):
        if math.isfinite(value):
            lines[-1].append(f"{x.place(at)},{y.place(value)}")
        elif lines[-1]:
            lines.append([])
    dots = [(x.place(at), y.place(value), f"{short(at)} tokens: {value:.5g}") for at, value in points
            if math.isfinite(value)]  # fmt: skip
    ends = [(x.place(at), y.place(value - errors[at]), y.place(value + errors[at])) for at, value in points
            if at in errors and math.isfinite(value)]  # fmt: skip
    return Curve(
        name=key,
        style=key.partition("/")[0],
        lines=[" ".join(line) for line in lines if line],
        dots=dots if len(dots) <= 40 else [],
        bars=ends if len(ends) <= 40 else [],
        last=f"{points[-1][1]:.4g}",
    )


def _thinned(points: list[Point]) -> list[Point]:
    """At most about `MOST_POINTS`: of each stretch the lowest and the highest, so that no peak is lost."""
    size = -(-2 * len(points) // MOST_POINTS)
    if size <= 2:
        return points
    kept: list[Point] = []
    for start in range(0, len(points), size):
        stretch = points[start : start + size]
        extremes = {min(stretch, key=lambda point: point[1]), max(stretch, key=lambda point: point[1])}
        undefined = [point for point in stretch if not math.isfinite(point[1])][:1]
        kept += sorted({*extremes, *undefined})
    return kept


@dataclass(frozen=True)
class Histogram:
    """Shares of the values in equally wide bins, of two sets on one axis: an outline each."""

    x: Axis
    y: Axis
    outlines: list[tuple[str, str]]
    """Name of the set, and its outline as polygon points."""
    zero: float | None
    """Where 0 stands, when it is inside."""


def histogram(sets: dict[str, Sequence[float]], num_bins: int = 28) -> Histogram | None:
    """None where no value is finite. The outermost bins hold what lies beyond the 1st and 99th percentile too."""
    finite = {name: [value for value in values if math.isfinite(value)] for name, values in sets.items()}
    everything = sorted(value for values in finite.values() for value in values)
    if not everything:
        return None
    low, high = everything[len(everything) // 100], everything[-1 - len(everything) // 100]
    x = Axis(low, high, LEFT, RIGHT) if high > low else Axis(low - 1, high + 1, LEFT, RIGHT)
    width = (x.high - x.low) / num_bins
    shares = {}
    for name, values in finite.items():
        counts = [0] * num_bins
        for value in values:
            counts[min(num_bins - 1, max(0, int((value - x.low) / width)))] += 1
        shares[name] = [count / max(1, len(values)) for count in counts]
    y = Axis(0.0, 1.1 * max(map(max, shares.values())), BOTTOM, TOP)
    outlines = []
    for name, heights in shares.items():
        corners: list[Point] = [(LEFT, BOTTOM)]
        for number, height in enumerate(heights):
            left, right = x.place(x.low + number * width), x.place(x.low + (number + 1) * width)
            corners += [(left, y.place(height)), (right, y.place(height))]
        outlines.append((name, " ".join(f"{across},{down}" for across, down in [*corners, (RIGHT, BOTTOM)])))
    return Histogram(x, y, outlines, x.place(0.0) if x.low <= 0 <= x.high else None)
