"""`llmtrain jobs collect`: the points of a sweep side by side, and which differ by more than their seeds do.

Points with equal settings but for `trainer.seed` are one, with as many figures as it has seeds. Two points differ where
Welch's t-test (1947; unequal variances, two-sided) says so at 5 %, corrected for the number of pairs after Holm (1979).
"""

import csv
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from io import StringIO
from itertools import combinations, product
from statistics import mean, stdev

from llmtrain.config.sweep import GridSweep, Search
from llmtrain.errors import ConfigError, UserError
from llmtrain.files import write_whole
from llmtrain.launch.engine import run_in
from llmtrain.launch.figures import figure
from llmtrain.launch.status import Status, statuses
from llmtrain.launch.sweeps import SweepDirectory

SEED = "trainer.seed"
LEVEL = 0.05
"""Of the test, for all pairs together."""
MOST_PAIRED = 100
"""Settings of which each pair is tested."""
MOST_LINES = 20
"""Of what is printed about pairs; differences.csv has them all."""


@dataclass(frozen=True)
class Setting:
    """One setting of a sweep, with the figures of its seeds."""

    number: int
    """From 1, in the order of the sweep."""
    values: dict[str, str]
    """Of what is varied, the seed left out."""
    runs: list[Status]
    figures: list[float]
    """Of the runs that have come to their end."""

    @property
    def mean(self) -> float:
        return mean(self.figures) if self.figures else math.nan

    @property
    def standard_error(self) -> float | None:
        """Of the mean; None with fewer than two seeds."""
        return stdev(self.figures) / math.sqrt(len(self.figures)) if len(self.figures) > 1 else None

    @property
    def state(self) -> str:
        states = dict.fromkeys(run.state for run in self.runs)
        return ", ".join(states)


@dataclass(frozen=True)
class Difference:
    """Of two settings."""

    one: Setting
    other: Setting
    t: float
    degrees_of_freedom: float
    p: float
    p_holm: float
    """`p`, corrected for the number of pairs."""

    @property
    def beyond_noise(self) -> bool:
        return self.p_holm < LEVEL


def collect(place: SweepDirectory) -> str:
    """Write points.md, points.csv, runs.csv, differences.csv, plots/*.png and conf/experiment/best.yaml into the
    sweep's directory; returns what there is to say. Raises UserError where no run has a figure yet."""
    from llmtrain.launch.best import write_best
    from llmtrain.launch.plots import plot

    found = statuses(place)
    if not found:
        raise UserError(f"{place.path}: no point has begun yet")
    varied = [key for key in place.read().varied if key != SEED]
    sweep = run_in(found[0].directory).frozen.config.sweep
    settings = settings_of(found, varied, sweep.metric)
    with_figures = [one for one in settings if one.figures]
    ranked = sorted(with_figures, key=lambda one: one.mean, reverse=sweep.direction == "max")
    if not ranked:
        raise UserError(f"no run of {place.path} has ended with a figure '{sweep.metric}'; `llmtrain jobs wait` waits")
    differences = differences_of(ranked)
    table = markdown(settings, varied, sweep, ranked[0])
    said = in_words(ranked, differences, sweep)
    write_whole(place.path / "points.md", f"{table}\n\n{said}\n")
    write_whole(place.path / "points.csv", as_csv(_point_rows(settings, sweep)))
    write_whole(place.path / "runs.csv", as_csv(_run_rows(settings, sweep)))
    write_whole(place.path / "differences.csv", as_csv(_difference_rows(differences)))
    plot(settings, varied, sweep, place.path / "plots")
    try:
        best = f"the best point as an experiment: {write_best(place, ranked[0], sweep)}"
    except ConfigError as error:
        best = f"the best point cannot be written as an experiment: {error}"
    return f"{table}\n\n{said}\n\n{best}\ntables and plots: {place.path}"


def settings_of(found: Sequence[Status], varied: list[str], metric: str) -> list[Setting]:
    """The runs of a sweep, those that differ only in their seed together."""

    def known(run: Status) -> list[float]:
        value = figure(run.directory, metric) if run.state == "finished" else None
        return [value] if value is not None and math.isfinite(value) else []

    groups: dict[tuple[str, ...], list[Status]] = {}
    for status in found:
        values = dict(line.partition("=")[::2] for line in status.point.overrides)
        groups.setdefault(tuple(values.get(key, "") for key in varied), []).append(status)
    return [
        Setting(
            number,
            dict(zip(varied, values, strict=True)),
            runs,
            [value for run in runs for value in known(run)],
        )
        for number, (values, runs) in enumerate(groups.items(), 1)
    ]


def differences_of(settings: Sequence[Setting]) -> list[Difference]:
    """Welch's test of each pair of settings with two seeds or more, p-values corrected after Holm; where they are many,
    of the first with each other one."""
    from scipy.stats import ttest_ind

    several, tested = [one for one in settings if len(one.figures) > 1], []
    pairs = combinations(several, 2) if len(several) <= MOST_PAIRED else product(several[:1], several[1:])
    for one, other in pairs:
        if stdev(one.figures) == stdev(other.figures) == 0:  # the test has no noise to divide by
            p = 1.0 if one.mean == other.mean else 0.0
            tested.append((one, other, math.copysign(math.inf, one.mean - other.mean) if p == 0 else 0.0, math.inf, p))
            continue
        test = ttest_ind(one.figures, other.figures, equal_var=False)
        tested.append((one, other, float(test.statistic), float(test.df), float(test.pvalue)))
    corrected, largest = {}, 0.0
    order = sorted(range(len(tested)), key=lambda i: tested[i][4])
    for rank, i in enumerate(order):
        largest = max(largest, min(1.0, (len(tested) - rank) * tested[i][4]))
        corrected[i] = largest
    return [Difference(*test, p_holm=corrected[i]) for i, test in enumerate(tested)]


def markdown(settings: Sequence[Setting], varied: list[str], sweep: GridSweep | Search, best: Setting) -> str:
    """The table of points, the best one in bold."""
    rows = [["point", *varied, "seeds", sweep.metric, "standard error", "state"]]
    for one in settings:
        error, bold = one.standard_error, "**" if one is best else ""
        figures = [
            f"{bold}{one.mean:.4f}{bold}" if one.figures else "",
            "" if error is None else f"{error:.4f}",
        ]
        rows.append([str(one.number), *one.values.values(), str(len(one.figures)), *figures, one.state])
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    rows.insert(1, ["-" * width for width in widths])
    padded = [[cell.ljust(width) for cell, width in zip(row, widths, strict=True)] for row in rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in padded)


def in_words(ranked: Sequence[Setting], differences: Sequence[Difference], sweep: GridSweep | Search) -> str:
    """Which settings differ by more than the seed noise."""
    best = ranked[0]
    lines = [f"best: point {best.number}, {_named(best)}: {sweep.metric} {best.mean:.4f}"]
    if not differences:
        how = "trainer.seed=0,1,2" if isinstance(sweep, GridSweep) else "sweep.seeds=[0,1,2]"
        return "\n".join([*lines, f"no two points have several seeds, so their noise is unknown; add {how}"])
    beyond = [one for one in differences if one.beyond_noise]
    lines.append(
        f"{len(beyond)} of {len(differences)} pairs differ by more than the seed noise (Welch's t-test, two-sided, "
        f"Holm-corrected, {LEVEL:.0%})"
    )
    for pair in beyond[:MOST_LINES]:
        one, other = pair.one, pair.other
        lines.append(f"  {one.number} and {other.number}: {one.mean:.4f} and {other.mean:.4f}, p {pair.p_holm:.2g}")
    if len(beyond) > MOST_LINES:
        lines.append(f"  and {len(beyond) - MOST_LINES} more in differences.csv")
    like = [
        pair.other if pair.one is best else pair.one
        for pair in differences
        if best in (pair.one, pair.other) and not pair.beyond_noise
    ]
    if like:
        lines.append(f"not told apart from the best: {', '.join(str(one.number) for one in like)}")
    if few := [one for one in ranked if len(one.figures) < 2]:
        lines.append(f"with one seed, so of unknown noise: {', '.join(str(one.number) for one in few)}")
    return "\n".join(lines)


def as_csv(rows: Sequence[dict[str, object]]) -> str:
    """Rows with a head of all their keys."""
    file = StringIO()
    writer = csv.DictWriter(file, list(dict.fromkeys(key for row in rows for key in row)), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue()


def _point_rows(settings: Sequence[Setting], sweep: GridSweep | Search) -> list[dict[str, object]]:
    return [
        {
            "point": one.number,
            **one.values,
            "seeds": len(one.figures),
            sweep.metric: one.mean if one.figures else "",
            "standard error": "" if one.standard_error is None else one.standard_error,
            "state": one.state,
        }
        for one in settings
    ]


def _run_rows(settings: Sequence[Setting], sweep: GridSweep | Search) -> list[dict[str, object]]:
    rows: list[dict[str, object]] = []
    for one in settings:
        for run in one.runs:
            overrides = dict(line.partition("=")[::2] for line in run.point.overrides)
            record = run.directory / "trained.json"
            last = json.loads(record.read_bytes())["metrics"] if record.exists() else {}
            row = {"point": one.number, "run": run.point.run, "state": run.state, "seed": overrides.get(SEED, "")}
            rows.append({**row, **one.values, "tokens": run.tokens, sweep.metric: figure(run.directory, sweep.metric),
                         **last})  # fmt: skip
    return rows


def _difference_rows(differences: Sequence[Difference]) -> list[dict[str, object]]:
    return [
        {
            "one": pair.one.number,
            "other": pair.other.number,
            "difference of means": pair.one.mean - pair.other.mean,
            "t": pair.t,
            "degrees of freedom": pair.degrees_of_freedom,
            "p": pair.p,
            "p (Holm)": pair.p_holm,
            "beyond seed noise": pair.beyond_noise,
        }
        for pair in differences
    ]


def _named(one: Setting) -> str:
    return " ".join(f"{key}={value}" for key, value in one.values.items()) or "the only one"
