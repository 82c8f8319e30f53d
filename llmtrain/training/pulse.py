"""What a run measures of itself, in order to be examined: rows of `vitals.jsonl`. It costs a few clock reads a step."""

import resource
import sys
import time
import warnings
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from llmtrain.telemetry.stopwatch import Stopwatch
from llmtrain.telemetry.vitals import VITALS_FILE, Vitals, VitalsFile, count_syncs

BETWEEN_STEPS = {"evaluation": "evaluation", "checkpoints": "checkpoints", "samples": "report", "report": "report"}
"""Phases of the stopwatch between two steps, and what they are called in `Vitals.seconds`."""


class Pulse:
    """The vitals of one process. For each step `begins`, `updates` and `ends` are called, `write` now and then."""

    def __init__(self, directory: Path, stopwatch: Stopwatch, writes: bool) -> None:
        """Only one process of a run `writes`."""
        self.file = VitalsFile(directory / VITALS_FILE) if writes else None
        self.stopwatch = stopwatch
        self.losses: list[float] = []
        self.grad_norms: list[float] = []
        self.first_of_process = self.fresh = True
        self._watching_syncs = ExitStack()
        self._warned: list[warnings.WarningMessage] | None = None
        self._forget()

    def _forget(self) -> None:
        self.losses, self.grad_norms, self.steps_here = [], [], 0
        self.seconds = dict.fromkeys(("data", "forward_backward", "optimizer"), 0.0)
        self.phases = self.stopwatch.seconds
        self.since = time.time()
        self.syncs: dict[str, int] | None = None

    def start(self) -> None:
        """Training begins: rows of a run that was killed before its first checkpoint are cut away."""
        self.phases = self.stopwatch.seconds
        if self.fresh:
            self.restore({"bytes": 0, "losses": [], "grad_norms": []})

    def begins(self, waiting_since: float) -> None:
        """A batch is there, which was waited for since then (of `time.monotonic`)."""
        self.now = time.monotonic()
        self.seconds["data"] += max(0.0, self.now - waiting_since)
        if torch.cuda.is_available() and self.file and self.syncs is None:
            self._warned = self._watching_syncs.enter_context(warnings.catch_warnings(record=True))
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            self._watching_syncs.callback(torch.cuda.set_sync_debug_mode, "default")

    def updates(self) -> None:
        """The gradient is there, the optimizer begins."""
        self._lap("forward_backward")

    def ends(self, loss: float, grad_norm: float) -> None:
        """The step is done."""
        self._lap("optimizer")
        self.leave()
        self.losses.append(loss)
        self.grad_norms.append(grad_norm)
        self.steps_here += 1

    def leave(self) -> None:
        """No longer count how often the CPU waits for the GPU; a step that fails ends here too."""
        self._watching_syncs.close()
        if self._warned is not None:
            self.syncs, others = count_syncs(self._warned)
            self._warned = None
            for warning in others:
                warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)

    def write(self, step: int, tokens: int) -> None:
        """Add a row on what happened since the last one."""
        if self.file:
            for phase, seconds in self.stopwatch.seconds.items():
                if name := BETWEEN_STEPS.get(phase):
                    self.seconds[name] = self.seconds.get(name, 0.0) + seconds - self.phases.get(phase, 0.0)
            num_compiled, compile_seconds, compile_reasons = _compiled(self.since)
            row = Vitals(
                step=step,
                tokens=tokens,
                losses=tuple(self.losses),
                grad_norms=tuple(self.grad_norms),
                time_utc=datetime.now(UTC).isoformat(timespec="seconds"),
                steps_here=self.steps_here,
                first_of_process=self.first_of_process,
                seconds={name: round(seconds, 6) for name, seconds in self.seconds.items()},
                num_compiled=num_compiled,
                compile_seconds=round(compile_seconds, 3),
                compile_reasons=compile_reasons,
                host_syncs=self.syncs or {},
                peak_memory_bytes=_peak_memory_bytes(),
            )
            self.file.append(row)
        self.first_of_process = False
        self._forget()

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps, for `restore`."""
        size = self.file.size if self.file else 0
        return {"bytes": size, "losses": self.losses, "grad_norms": self.grad_norms}

    def restore(self, state: dict[str, Any] | None) -> None:
        """Go on from a checkpoint's state; one of an older llmtrain has none."""
        state, self.fresh = state or {"bytes": 0, "losses": [], "grad_norms": []}, False
        self.losses, self.grad_norms = state["losses"], state["grad_norms"]
        if self.file:
            self.file.truncate(state["bytes"])

    def _lap(self, name: str) -> None:
        now = time.monotonic()
        self.seconds[name] += max(0.0, now - self.now)
        self.now = now


def _compiled(since: float) -> tuple[int, float, dict[str, int]]:
    """(graphs that torch.compile made since then, seconds, reasons to make one again); the newest 64 are known."""
    if "torch._dynamo.utils" not in sys.modules:  # nothing was compiled; the import takes a second
        return 0, 0.0, {}
    from torch._dynamo.utils import get_compilation_metrics

    made = [metrics for metrics in get_compilation_metrics() if (metrics.start_time or 0.0) >= since]
    reasons: dict[str, int] = {}
    for metrics in made:
        if metrics.recompile_reason:
            reason = metrics.recompile_reason.splitlines()[0].partition(": ")[2]
            reasons[reason] = reasons.get(reason, 0) + 1
    num_graphs = sum(metrics.fail_type is None for metrics in made)
    return num_graphs, sum(metrics.duration_us or 0 for metrics in made) / 1e6, reasons


def _peak_memory_bytes() -> int:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
