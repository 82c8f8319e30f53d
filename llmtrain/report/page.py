"""From a run's directory to its page: everything in one file, nothing fetched, everything from data escaped."""

import base64
import hashlib
import math
from collections.abc import Sequence
from functools import cache
from itertools import zip_longest
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from llmtrain import __version__
from llmtrain.artifacts import ModelVersion
from llmtrain.report.baselines import levels
from llmtrain.report.charts import HEIGHT, WIDTH, Chart, Histogram, curve_chart, histogram, short
from llmtrain.report.facts import Facts, gather
from llmtrain.report.records import Margins, Process, Samples
from llmtrain.report.settings import lines
from llmtrain.report.verdict import diagnostics, figures, verdict
from llmtrain.telemetry.curves import PANELS

HERE = Path(__file__).parent
MOST_SAMPLES = 8
"""Steps whose samples are shown, the first and the last among them."""
MOST_SOURCES = 20
KINDS = {"text": ("Text", "documents"), "preferences": ("Preferences", "pairs"), "chats": ("Chats", "chats")}
"""Of data: its title, and what a split counts."""


def page(directory: Path, outputs: Path, version: ModelVersion | None = None) -> str:
    """The HTML of a run's report, as things stand.

    `version` is what the run is being registered as, where `version.json` is still to be written. Raises IntegrityError
    where one of the run's files is damaged.
    """
    facts = gather(directory, outputs, version)
    split, found = figures(facts)
    script = (HERE / "report.js").read_text()
    html: str = _template().render(
        facts=facts,
        frozen=facts.frozen,
        verdict=verdict(facts),
        split=split,
        figures=found,
        progress=_progress(facts),
        charts=_charts(facts),
        width=WIDTH,
        height=HEIGHT,
        prompts=_by_prompt(facts.samples),
        preferences=_preferences(facts.margins) if facts.margins else None,
        diagnostics=diagnostics(facts),
        settings=lines(facts.frozen.config),
        kinds=KINDS,
        most_sources=MOST_SOURCES,
        phases=_phases(facts.processes),
        tokens_per_second=_tokens_per_second(facts.processes),
        style=(HERE / "report.css").read_text(),
        script=script,
        script_sha256=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        llmtrain_version=__version__,
    )
    return html


@cache
def _template() -> Any:
    environment = Environment(
        loader=FileSystemLoader(HERE),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"short": short, "duration": _duration}
    return environment.get_template("report.html.jinja")


def _progress(facts: Facts) -> str:
    last = facts.rows[-1] if facts.rows else {"step": 0, "tokens": 0}
    return f"step {last['step']:,}, {last['tokens']:,} tokens"


def _charts(facts: Facts) -> list[Chart]:
    against = levels(facts.frozen.config.trainer, facts.baselines)
    charts = [curve_chart(title, unit, facts.rows, keys, against.get(keys[-1], {})) for title, unit, keys in PANELS]
    return [chart for chart in charts if chart]


def _by_prompt(samples: Sequence[Samples]) -> list[tuple[str, list[tuple[int, str]]]]:
    """Each prompt with its continuations by tokens trained on."""
    last = len(samples) - 1
    chosen = samples
    if last >= MOST_SAMPLES:
        chosen = [samples[round(number * last / (MOST_SAMPLES - 1))] for number in range(MOST_SAMPLES)]
    columns = [[(step.tokens, sample) for sample in step.samples] for step in chosen]
    rows = [[cell for cell in row if cell] for row in zip_longest(*columns)]
    return [(row[-1][1].prompt, [(tokens, sample.continuation) for tokens, sample in row]) for row in rows]


def _preferences(margins: Margins) -> dict[str, Any]:
    """Histograms and summary of the pairs of one split, before and after tuning."""
    rewards = margins.rewards
    title = "Reward margin, nats"
    if rewards is None:
        rewards = tuple(margins.beta * (a - b) for b, a in zip(margins.before, margins.after, strict=True))
        title = "Reward margin: 0 for every pair before tuning"
    charts: list[tuple[str, Histogram | None]] = [
        (title, histogram({"after": rewards})),
        (
            "ln p(chosen) − ln p(rejected), nats",
            histogram({"before": margins.before, "after": margins.after}),
        ),
    ]
    ordered = sorted(rewards)
    return {
        "split": margins.split,
        "num_pairs": len(rewards),
        "charts": [(title, chart) for title, chart in charts if chart],
        "mean": sum(rewards) / max(1, len(rewards)),
        "median": ordered[len(ordered) // 2] if ordered else math.nan,
        "likelier_before": _share_above_zero(margins.before),
        "likelier_after": _share_above_zero(margins.after),
    }


def _share_above_zero(values: Sequence[float]) -> float:
    return sum((value > 0) + (value == 0) / 2 for value in values) / max(1, len(values))


def _phases(processes: Sequence[Process]) -> list[tuple[str, float, float]]:
    """Name, seconds and share of each phase, over all processes that worked on the run."""
    seconds: dict[str, float] = {}
    for process in processes:
        for phase, spent in process.seconds.items():
            seconds[phase] = seconds.get(phase, 0.0) + spent
    total = sum(seconds.values())
    return [(phase, spent, spent / total if total else 0.0) for phase, spent in seconds.items()]


def _tokens_per_second(processes: Sequence[Process]) -> float | None:
    """While training, evaluations and checkpoints aside."""
    seconds = sum(process.seconds.get("training", 0.0) for process in processes)
    return sum(process.tokens for process in processes) / seconds if seconds else None


def _duration(seconds: float) -> str:
    """0.31 -> 0.3 s; 75 -> 1 min 15 s; 3725 -> 1 h 2 min."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min {rest} s"
