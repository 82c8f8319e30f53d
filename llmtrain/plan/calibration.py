"""What past runs on the same machine teach: a few factors, each with a physical meaning and close to one.

A step takes  sum of factor * seconds over the classes of kernels, + seconds per call * calls.  Where others made the
machine slower during a run, which products of matrices between its steps tell, what computes took so much longer; of
the next run, what the median run saw is expected.
A process takes  its baseline + what loads while training starts + factor * the simulated heap.
Both are fitted to relative errors, by ridge regression towards what is known without runs (factor one), with Huber's
weights, so that one disturbed run does not spoil the plan. With no run at all the plan is that prior.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import numpy as np
import numpy.typing as npt
from pydantic import ValidationError

from llmtrain.plan.records import CLASSES, Features, PlanVsActual

Vector = npt.NDArray[np.float64]

_NAMES = (*CLASSES, "calls")
_BY_MEMORY = ("elementwise", "optimizer")
"""Classes that wait for memory and are believed not to be slower then; the others compute."""
SECONDS_PER_CALL = 4e-6
"""Prior: Python, dispatch and autograd of one operator, beyond the kernel's own call."""
LOADED_BYTES = 30e6
"""Prior: libraries that come with the trainer, the tracker and the curves."""
_SPREAD = {"gemm": 0.2, "attention": 0.2, "elementwise": 0.4, "head": 0.2, "optimizer": 0.4, "calls": 0.5}
"""How far each factor is believed to be from one, as a standard deviation."""
_NOISE = 0.03
"""Relative error of a measured step or peak that is taken for granted."""
_HUBER = 1.5


@dataclass(frozen=True)
class Calibration:
    """Factors by class, and from how many runs they are."""

    factors: dict[str, float]
    slowdown: float
    """How many times slower than undisturbed the machine is expected to compute"""
    loaded_bytes: float
    heap_factor: float
    num_runs: int

    def seconds(self, features: Features) -> dict[str, float]:
        """Of a mean step, by class, where others disturb the machine as they did past runs."""
        return {name: self.factors[name] * value for name, value in _seconds(features, self.slowdown).items()}

    def peak_bytes(self, features: Features) -> float:
        return features.baseline_bytes + self.loaded_bytes + self.heap_factor * features.heap_bytes


def calibrated(runs: Sequence[PlanVsActual]) -> Calibration:
    """Fit the factors to `runs`."""
    features = [run.prediction.features for run in runs]
    slower = [_slowdown(run) for run in runs]
    rows = [list(_seconds(one, by).values()) for one, by in zip(features, slower, strict=True)]
    seconds = np.array([run.measured.seconds_per_step for run in runs])
    shape = len(rows), len(_NAMES)
    factors = _ridge(np.array(rows).reshape(shape), seconds, np.ones(len(_NAMES)), [_SPREAD[n] for n in _NAMES])
    beyond = np.array(
        [float(run.measured.peak_bytes - one.baseline_bytes) for run, one in zip(runs, features, strict=True)]
    )
    whole = np.array([float(run.measured.peak_bytes) for run in runs])
    memory = np.array([[LOADED_BYTES, float(one.heap_bytes)] for one in features]).reshape(-1, 2)
    loaded, heap = _ridge(memory, beyond, np.ones(2), [1.0, 0.1], scale=whole)
    return Calibration(
        factors=dict(zip(_NAMES, factors.tolist(), strict=True)),
        slowdown=median(slower) if slower else 1.0,
        loaded_bytes=float(loaded) * LOADED_BYTES,
        heap_factor=float(heap),
        num_runs=len(runs),
    )


def _slowdown(run: PlanVsActual) -> float:
    """How many times slower than undisturbed the machine computed; 1 where it is not known."""
    undisturbed = run.prediction.features.product_seconds
    return run.product_seconds / undisturbed if run.product_seconds and undisturbed else 1.0


def _seconds(features: Features, slowdown: float) -> dict[str, float]:
    """By class, in the order of `_NAMES`, before calibration, on a machine that computes so many times slower."""
    found = {name: features.seconds.get(name, 0.0) for name in CLASSES} | {"calls": SECONDS_PER_CALL * features.calls}
    return {name: value if name in _BY_MEMORY else value * slowdown for name, value in found.items()}


def _ridge(rows: Vector, wanted: Vector, prior: Vector, spread: Sequence[float], scale: Vector | None = None) -> Vector:
    """Non-negative factors: rows @ factors is `wanted` within `_NOISE * scale`, factors are `prior` within `spread`."""
    if not len(wanted):
        return prior
    scale = wanted if scale is None else scale
    a, b = rows / scale[:, None] / _NOISE, wanted / scale / _NOISE
    weights = np.ones(len(b))
    factors = prior
    for _ in range(20):
        left = np.concatenate([a * weights[:, None], np.diag(1 / np.array(spread))])
        right = np.concatenate([b * weights, prior / np.array(spread)])
        factors = np.linalg.lstsq(left, right, rcond=None)[0].clip(0.05)
        residuals = np.abs(a @ factors - b)
        weights = np.sqrt(np.minimum(1.0, _HUBER / np.maximum(residuals, 1e-9)))
    return factors


def runs_on(outputs: Path, machine: dict[str, str]) -> list[PlanVsActual]:
    """What the runs in `outputs` that had this machine made of their plans; the newest 50."""
    found = []
    paths = sorted(outputs.glob("*/*/plan_vs_actual.json"), key=lambda path: path.stat().st_mtime, reverse=True)
    for path in paths:
        try:
            run = PlanVsActual.model_validate_json(path.read_bytes())
        except ValidationError:  # of another version of llmtrain
            continue
        if run.prediction.machine == machine:
            found.append(run)
    return found[:50]
