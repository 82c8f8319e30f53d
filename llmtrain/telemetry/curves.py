"""The curves of a run as a picture, from its metrics.jsonl."""

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmtrain.files import fsync, writing
from llmtrain.telemetry.metrics import read

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PANELS = (
    ("Loss", "nats", ("train/loss", "validation/loss")),
    ("Validation bits per byte", "bits / byte", ("validation/bits_per_byte",)),
    ("Preference accuracy, validation", "share", ("validation/accuracy",)),
    ("Reward margin, validation", "nats", ("validation/margin",)),
    ("Change of the chosen answer's log-probability", "nats", ("validation/chosen_logp_change",)),
    ("Divergence from the teacher, validation", "nats / token", ("validation/divergence",)),
    ("Distance from the reference, validation (k3)", "nats / token", ("validation/kl_k3",)),
    ("Held-out language loss, validation", "nats", ("validation/heldout_loss",)),
    ("Learning rate", "", ("train/lr",)),
    ("Gradient norm before clipping", "", ("train/grad_norm",)),
    ("Speed", "tokens / s", ("train/tokens_per_second",)),
)
"""Title, unit, and the metrics drawn; a panel without any of them in the rows is left out."""


def plot_curves(metrics_path: Path, png_path: Path, levels: dict[str, dict[str, float]]) -> None:
    """Draw what the rows hold against tokens. `levels` are baselines by metric and name: dotted lines in its panel.

    The picture appears whole or not at all. Infinite and undefined values leave gaps.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter

    rows = read(metrics_path)
    present = {key for row in rows for key in row}
    panels = [panel for panel in PANELS if present & set(panel[2])] or list(PANELS[:1])
    num_columns = min(2, len(panels))
    num_lines = -(-len(panels) // num_columns)
    figure = Figure(figsize=(6 * num_columns, 3.4 * num_lines), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(num_lines, num_columns, squeeze=False, sharex=True).flat
    for (title, unit, keys), axes in zip(panels, grid, strict=False):
        for key in keys:
            _draw(axes, rows, key)
        for number, (name, value) in enumerate(levels.get(keys[-1], {}).items()):
            axes.axhline(value, linestyle=":", color=f"C{number + 2}", label=f"{name} ({value:.3g})")
        if axes.lines and (len(keys) > 1 or keys[-1] in levels):
            axes.legend(fontsize=8)
        axes.set_title(title, fontsize=10)
        axes.set_ylabel(unit)
        axes.set_xlabel("tokens")
        axes.tick_params(labelbottom=True)  # also above another panel
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.grid(alpha=0.25)
    for axes in grid:  # what the panels left over
        axes.set_axis_off()
    aside = png_path.with_name(f"{png_path.name}.writing")
    with writing(png_path):
        figure.savefig(aside, format="png")
        fsync(aside)
        aside.rename(png_path)


def _draw(axes: "Axes", rows: list[dict[str, Any]], key: str) -> None:
    """One metric against tokens, with the standard error (`<key>_se`) as bars where the rows have it."""
    found = [row for row in rows if key in row]
    tokens = [row["tokens"] for row in found]
    values = [row[key] if math.isfinite(row[key]) else math.nan for row in found]
    color, marker = ("C0", "") if key.startswith("train/") else ("C1", "o")
    axes.plot(tokens, values, label=key, color=color, marker=marker, markersize=4, linewidth=1.4)
    if all(f"{key}_se" in row for row in found):
        axes.errorbar(tokens, values, [row[f"{key}_se"] for row in found], fmt="none", color=color, capsize=3)
