"""Two peers on the same work: each run a process of its own, taking turns, equal losses asserted.

A worker trains some steps and prints what it saw as one line of JSON (`report`). The first step is warm-up; the others
are timed from the end of one step to the end of the next, everything in between included. Peak memory is the process's
VmHWM, so the interpreter and the imports count; what they alone take is said beside it.
"""

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

MARK = "measured: "
LOSS_TOLERANCE = 1e-4
"""Largest relative difference between two peers' losses of a step."""
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "DO_NOT_TRACK": "1",
}


@dataclass
class Seen:
    """What one worker saw."""

    losses: list[float] = field(default_factory=list)
    """Of each step, warm-up included."""
    seconds: list[float] = field(default_factory=list)
    """Of each step but the first."""
    cpu_seconds: list[float] = field(default_factory=list)
    """The same by the clocks of all its threads: what a busy machine disturbs less."""
    imported_bytes: int = 0
    """Resident after the imports, before there is a model."""
    peak_bytes: int = 0
    """VmHWM at the end."""

    @property
    def seconds_per_step(self) -> float:
        return sum(self.seconds) / len(self.seconds)


class Clock:
    """Called at the end of each step; knows the time of every step but the first."""

    def __init__(self) -> None:
        self.ends: list[tuple[float, float]] = []

    def __call__(self) -> None:
        self.ends.append((time.perf_counter(), time.process_time()))

    @property
    def seconds(self) -> list[float]:
        return [stop - start for (start, _), (stop, _) in pairwise(self.ends)]

    @property
    def cpu_seconds(self) -> list[float]:
        return [stop - start for (_, start), (_, stop) in pairwise(self.ends)]


def resident_bytes(name: str = "VmRSS") -> int:
    """VmRSS or VmHWM (the most there ever was) of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def report(losses: Sequence[float], clock: Clock, imported_bytes: int) -> None:
    """A worker's last word."""
    seen = Seen(list(losses), clock.seconds, clock.cpu_seconds, imported_bytes, resident_bytes("VmHWM"))
    print(MARK + json.dumps(asdict(seen)), flush=True)


def work(script: Path, arguments: Sequence[str], threads: int) -> Seen:
    """Run `script` as a worker; 0 threads: as many as it likes. Raises RuntimeError, with its output, if it fails."""
    environment = os.environ | ENVIRONMENT | ({"OMP_NUM_THREADS": str(threads)} if threads else {})
    done = subprocess.run(
        [sys.executable, str(script), *arguments], env=environment, capture_output=True, text=True, check=False
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith(MARK)]
    if done.returncode or not lines:
        raise RuntimeError(f"{script.name} {' '.join(arguments)} failed:\n{done.stdout[-2000:]}{done.stderr[-4000:]}")
    return Seen(**json.loads(lines[-1].removeprefix(MARK)))


def alternate(workers: dict[str, Callable[[], Seen]], rounds: int, equal_losses: bool = True) -> dict[str, list[Seen]]:
    """All workers in turn, `rounds` times. Raises AssertionError where losses differ that should be equal."""
    found: dict[str, list[Seen]] = {name: [] for name in workers}
    for number in range(rounds):
        for name, run in workers.items():
            found[name].append(run())
            seen = found[name][-1]
            print(
                f"  round {number + 1} {name:14} {seen.seconds_per_step:8.3f} s/step "
                f"({sum(seen.cpu_seconds) / len(seen.cpu_seconds):.3f} of CPU) {seen.peak_bytes / 1e9:6.2f} GB   "
                f"losses {' '.join(f'{loss:.6f}' for loss in seen.losses)}",
                file=sys.stderr,
                flush=True,
            )
        difference = largest_difference([runs[-1] for runs in found.values()]) if equal_losses else 0.0
        assert difference <= LOSS_TOLERANCE, f"losses differ by {difference:.1e}: {found}"
    return found


def largest_difference(runs: Sequence[Seen]) -> float:
    """The largest relative difference of any step's loss from that of the first run."""
    first, *others = runs
    pairs = [pair for other in others for pair in zip(first.losses, other.losses, strict=True)]
    return max((abs(theirs - ours) / abs(ours) for ours, theirs in pairs), default=0.0)


def compare(ours: Sequence[Seen], theirs: Sequence[Seen], units_per_step: float) -> dict[str, Any]:
    """Medians over rounds, and of the rounds' ratios.

    `speed` is their seconds over ours, `memory` our peak bytes over theirs.
    """
    speeds = [their.seconds_per_step / our.seconds_per_step for our, their in zip(ours, theirs, strict=True)]
    memories = [our.peak_bytes / their.peak_bytes for our, their in zip(ours, theirs, strict=True)]
    return {
        "rounds": len(ours),
        "steps": len(ours[0].seconds),
        "ours": _medians(ours, units_per_step),
        "theirs": _medians(theirs, units_per_step),
        "speed": statistics.median(speeds),
        "speeds": speeds,
        "memory": statistics.median(memories),
        "loss_difference": max(largest_difference([our, their]) for our, their in zip(ours, theirs, strict=True)),
    }


def _medians(runs: Sequence[Seen], units_per_step: float) -> dict[str, float]:
    seconds = statistics.median(run.seconds_per_step for run in runs)
    return {
        "seconds_per_step": seconds,
        "units_per_second": units_per_step / seconds,
        "peak_gb": statistics.median(run.peak_bytes for run in runs) / 1e9,
        "imported_gb": statistics.median(run.imported_bytes for run in runs) / 1e9,
    }


def table(rows: Sequence[Sequence[str]]) -> str:
    """Rows as a Markdown table, the first one its head."""
    head, *body = rows
    lines = [head, ["---"] * len(head), *body]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def row_of(case: str, found: dict[str, Any], bar: str) -> list[str]:
    """A comparison as a row under `HEAD`."""
    ours, theirs = found["ours"], found["theirs"]
    spread = f"{min(found['speeds']):.2f} to {max(found['speeds']):.2f}"
    return [
        case,
        f"{ours['units_per_second']:.4g}",
        f"{theirs['units_per_second']:.4g}",
        f"**{found['speed']:.2f}** ({spread})",
        f"{ours['peak_gb']:.2f}",
        f"{theirs['peak_gb']:.2f}",
        f"**{found['memory']:.2f}**",
        bar,
        f"{found['loss_difference']:.0e}",
    ]


def head(unit: str, peer: str) -> list[str]:
    """The head over `row_of`."""
    return [
        "case", f"llmtrain, {unit}/s", f"{peer}, {unit}/s", "speed, x (range)", "llmtrain, GB", f"{peer}, GB",
        "memory, x", "bar", "losses differ by",
    ]  # fmt: skip


def save(path: Path | None, results: dict[str, Any]) -> None:
    """Add `results` to the JSON file at `path`, if one is named."""
    if path is not None:
        known = json.loads(path.read_bytes()) if path.exists() else {}
        path.write_text(json.dumps(known | results, indent=1, sort_keys=True) + "\n")
