"""Losses that jump out of line, and the step that had none."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from llmtrain.config.frozen import FrozenRun
from llmtrain.doctor.findings import Finding
from llmtrain.telemetry.vitals import Vitals
from llmtrain.training.origin import Sickness

WINDOW, FEWEST = 32, 8
"""Steps before a step that it is held against, and the fewest that say anything."""
ROBUST_Z = 8.0
"""Deviations from the median above which a loss is a spike; a deviation is 1.4826 median absolute ones, which is the
standard deviation of normal noise."""
SMALLEST_RISE = 0.05
"""Of the median: less is no spike, however quiet the steps before were."""


@dataclass(frozen=True)
class Spike:
    """A step whose loss is far above those before."""

    step: int
    loss: float
    usual: float
    """The median of the steps before."""
    deviations: float
    grad_norm: float
    usual_grad_norm: float


def spikes(rows: list[Vitals]) -> list[list[Spike]]:
    """The spikes of a run, steps that follow each other together, the worst first.

    A spike is not part of what later steps are held against.
    """
    losses = [loss for row in rows for loss in row.losses]
    norms = [norm for row in rows for norm in row.grad_norms]
    first = rows[0].first_step if rows else 1
    found = []
    calm: list[int] = []
    for place, loss in enumerate(losses):
        before = [losses[index] for index in calm[-WINDOW:]]
        if len(before) >= FEWEST:
            usual, deviations = robust_z(loss, before)
            if deviations > ROBUST_Z and loss - usual > SMALLEST_RISE * abs(usual):
                usual_norm = median(norms[index] for index in calm[-WINDOW:])
                found.append(Spike(first + place, loss, usual, deviations, norms[place], usual_norm))
                continue
        calm.append(place)
    together: list[list[Spike]] = []
    for spike in found:
        if together and spike.step == together[-1][-1].step + 1:
            together[-1].append(spike)
        else:
            together.append([spike])
    return sorted(together, key=lambda group: -worst(group).deviations)


def worst(group: Sequence[Spike]) -> Spike:
    return max(group, key=lambda spike: spike.deviations)


def robust_z(value: float, before: Sequence[float]) -> tuple[float, float]:
    """(median of `before`, deviations by which `value` is above it)."""
    middle = median(before)
    spread = 1.4826 * median(abs(one - middle) for one in before)
    if spread == 0:
        return middle, math.inf if value > middle else 0.0
    return middle, (value - middle) / spread


def spike_finding(spike: Spike, frozen: FrozenRun, details: Sequence[str], advice: Sequence[str]) -> Finding:
    """`details` name the rows, `advice` what to do about them."""
    trainer = frozen.config.trainer
    lower = float(f"{max(spike.usual_grad_norm, 1e-9):.1g}")
    remedies = list(advice)
    if lower < trainer.max_grad_norm and spike.grad_norm > 2 * spike.usual_grad_norm:
        remedies.append(f"trainer.max_grad_norm={lower:g} lets such a step count for no more than others (now "
                        f"{trainer.max_grad_norm:g})")  # fmt: skip
    remedies.append(f"trainer.lr={trainer.lr / 2:g}, where spikes go on without rows of their own (now {trainer.lr:g})")
    return Finding(
        kind="loss spike",
        seen=f"step {spike.step}: loss {spike.loss:.3f} where {spike.usual:.3f} is usual ({spike.deviations:.0f} "
        f"robust deviations), gradient norm {spike.grad_norm:.2f} where {spike.usual_grad_norm:.2f} is",
        remedies=tuple(remedies),
        details=tuple(details),
        facts={"step": spike.step, "loss": spike.loss, "usual": spike.usual, "deviations": spike.deviations},
    )


def divergence(group: Sequence[Spike], frozen: FrozenRun) -> Finding:
    """So many spikes in a row that no single step is to blame."""
    trainer, first, last = frozen.config.trainer, group[0], group[-1]
    return Finding(
        kind="divergence",
        seen=f"from step {first.step} to {last.step} the loss is above what it was: {last.loss:.3f} where "
        f"{first.usual:.3f} was usual; the gradient norm began at {first.grad_norm:.2f} where "
        f"{first.usual_grad_norm:.2f} was",
        remedies=(
            f"trainer.lr={trainer.lr / 2:g} (now {trainer.lr:g})",
            f"trainer.warmup_tokens={max(1000, 2 * trainer.warmup_tokens)} (now {trainer.warmup_tokens})",
            f"trainer.max_grad_norm={trainer.max_grad_norm / 2:g} (now {trainer.max_grad_norm:g})",
        ),
        facts={"first_step": first.step, "last_step": last.step, "loss": last.loss, "usual": first.usual},
    )


def not_finite(sickness: Sickness, frozen: FrozenRun, details: Sequence[str]) -> Finding:
    """Why the run stopped; `details` name the rows."""
    trainer, infra, origin = frozen.config.trainer, frozen.config.infra, sickness.origin
    remedies = []
    if origin is not None and origin.weight:
        remedies.append(
            "the weights are not finite before the step: delete the newest checkpoint, where it is "
            "in there too, and run the same command, or set trainer.init_from to a sound model"
        )
    if infra.precision == "bf16":
        remedies.append("infra.precision=fp32, where numbers of bf16 overflow or lose too much")
    remedies += [
        f"trainer.lr={trainer.lr / 2:g} (now {trainer.lr:g}; {sickness.lr:.1e} at this step)",
        f"trainer.warmup_tokens={max(1000, 2 * trainer.warmup_tokens)} (now {trainer.warmup_tokens})",
    ]
    if details:
        remedies.append("look at the rows below the origin: take out of the data what is no text")
    return Finding(
        kind="not finite",
        seen=f"step {sickness.step}: loss {sickness.loss}, gradient norm {sickness.grad_norm}; {sickness.told()}"
        + (f"; the largest finite number that went in is {origin.largest_input:.3g}" if origin else ""),
        remedies=tuple(remedies),
        details=tuple(details),
        facts=sickness.model_dump(mode="json"),
    )
