"""Pictures of a sweep: its metric against each thing that was varied, and all of them as parallel coordinates."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from llmtrain.config.sweep import GridSweep, Search
from llmtrain.files import writing

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from llmtrain.launch.collect import Setting

LOGARITHMIC = 20.0
"""Values that are so many times apart are drawn by their logarithm."""


def plot(settings: "Sequence[Setting]", varied: list[str], sweep: GridSweep | Search, directory: Path) -> None:
    """Draw the settings that have figures into `directory`: `by-<key>.png`, and `parallel.png` where several vary."""
    drawn = [one for one in settings if one.figures and math.isfinite(one.mean)]
    directory.mkdir(exist_ok=True)
    for key in varied if drawn else []:
        _save(_against(drawn, key, sweep), directory / f"by-{key.replace('/', '.')}.png")
    if drawn and len(varied) > 1:
        _save(_parallel(drawn, varied, sweep), directory / "parallel.png")


def _against(settings: "Sequence[Setting]", key: str, sweep: GridSweep | Search) -> "Figure":
    figure = _figure(6, 4)
    axes = figure.subplots()
    places, names = _places([one.values[key] for one in settings])
    errors = [one.standard_error or 0.0 for one in settings]
    axes.errorbar(places, [one.mean for one in settings], yerr=errors, fmt="o", capsize=3)
    for place, one in zip(places, settings, strict=True):
        axes.annotate(str(one.number), (place, one.mean), textcoords="offset points", xytext=(5, 3), fontsize=7)
    if names:
        axes.set_xticks(range(len(names)), names)
    elif _is_wide(places):
        axes.set_xscale("log")
    axes.set_xlabel(key)
    axes.set_ylabel(sweep.metric + (", mean ± standard error" if any(errors) else ""))
    axes.grid(alpha=0.25)
    return figure


def _parallel(settings: "Sequence[Setting]", varied: list[str], sweep: GridSweep | Search) -> "Figure":
    """One line a setting, over an axis for each thing varied; the colour, and the last axis, are the metric."""
    from matplotlib import colormaps
    from matplotlib.colors import Normalize

    columns = [_scaled([one.values[key] for one in settings]) for key in varied]
    columns.append(_scaled([repr(one.mean) for one in settings], log=False))
    means = [one.mean for one in settings]
    colour, colours = Normalize(min(means), max(means)), colormaps["viridis"]
    figure = _figure(2.2 * len(columns) + 1, 4)
    axes = figure.subplots()
    for number, one in enumerate(settings):
        heights = [heights[number] for heights, _ in columns]
        axes.plot(range(len(columns)), heights, color=colours(colour(one.mean)), alpha=0.8)
    for column, (_, ticks) in enumerate(columns):
        axes.axvline(column, color="0.6", linewidth=0.8)
        for height, text in ticks:
            box = {"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1}
            axes.annotate(
                text,
                (column, height),
                textcoords="offset points",
                xytext=(4, 0),
                fontsize=7,
                va="center",
                bbox=box,
            )
    axes.set_xticks(range(len(columns)), [*varied, sweep.metric], fontsize=8)
    axes.set_yticks([])
    axes.spines[:].set_visible(False)
    axes.set_xlim(-0.2, len(columns) - 0.4)
    return figure


def _places(values: Sequence[str]) -> tuple[list[float], list[str]]:
    """Where values stand on an axis; and, where they are no numbers, the names at 0, 1, ..."""
    try:
        return [float(value) for value in values], []
    except ValueError:
        names = sorted(dict.fromkeys(values))
        return [float(names.index(value)) for value in values], names


def _scaled(values: Sequence[str], *, log: bool = True) -> tuple[list[float], list[tuple[float, str]]]:
    """Heights from 0 to 1, and what to write beside the axis where."""
    places, names = _places(values)
    texts = names or [f"{end:.4g}" for end in (min(places), max(places))]
    if log and not names and _is_wide(places):
        places = [math.log(place) for place in places]
    low, high = min(places), max(places)
    heights = [(place - low) / (high - low) if high > low else 0.5 for place in places]
    steps = len(texts) - 1
    return heights, [(number / steps if steps else 0.5, text) for number, text in enumerate(texts)]


def _is_wide(places: Sequence[float]) -> bool:
    return min(places) > 0 and max(places) / min(places) >= LOGARITHMIC


def _figure(width: float, height: float) -> "Figure":
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _save(figure: "Figure", path: Path) -> None:
    aside = path.with_name(f"{path.name}.writing")
    with writing(path):
        figure.savefig(aside, format="png")
        aside.rename(path)
