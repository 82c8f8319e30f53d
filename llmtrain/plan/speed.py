"""How long a step takes: kernel by kernel where this machine is the one, by an assumed share of the peak elsewhere."""

from collections import defaultdict
from collections.abc import Callable
from statistics import median

from llmtrain.config.hardware import MeasuredHardware, PublishedHardware
from llmtrain.config.infra import Infra
from llmtrain.plan.flops import flops
from llmtrain.plan.memory import bytes_between_ranks
from llmtrain.plan.records import PlanVsActual
from llmtrain.plan.step import StepTrace
from llmtrain.plan.trace import Op, Trace
from llmtrain.plan.workload import Row, Workload


def class_of(op: Op) -> str:
    """Which rate an operator's time depends on; see `records.CLASSES`."""
    if op.phase in ("optimizer", "head"):
        return op.phase
    name = op.name.split(".")[1]
    if name in ("mm", "addmm", "bmm", "addmm_", "baddbmm"):
        return "gemm"
    return "attention" if "scaled_dot_product" in name or "block_attention" in name else "elementwise"


def kernel_seconds(
    step: StepTrace, workload: Workload, seconds: Callable[[Op], float]
) -> tuple[dict[str, float], float]:
    """(seconds by class, operators called) of a mean step, when one call of a kernel takes `seconds`.

    Micro-batches that differ from the traced one are scaled: attention by the pairs of tokens that see each other, the
    head by its targets, the rest by tokens.
    """
    first, more, update = (_by_class(trace, seconds) for trace in (step.first, step.more, step.update))
    found: dict[str, float] = defaultdict(float)
    calls = 0.0
    for rows in workload.steps:
        for number, row in enumerate(rows):
            shares = _shares(row, step.row)
            for name, value in (more if number else first).items():
                found[name] += value * shares.get(name, shares["elementwise"])
            calls += (step.more if number else step.first).num_calls.total()
        for name, value in update.items():
            found[name] += value
        calls += step.update.num_calls.total()
    return {name: value / len(workload.steps) for name, value in found.items()}, calls / len(workload.steps)


def assumed_seconds(
    step: StepTrace,
    workload: Workload,
    infra: Infra,
    peak: float,
    bandwidth: float,
    link: float | None,
    mfu: float,
) -> dict[str, float]:
    """Seconds by class of a mean step that reaches `mfu` of `peak` (FLOP/s of one device), causal attention halved.

    The classes share the time as a roofline does: what a kernel computes over the peak, or what it reads and writes
    over the bandwidth, whichever is longer. `link` is what the wires between ranks take beyond that, where it does not
    hide.
    """
    rows = [row for rows in workload.steps for row in rows]
    counted = flops(rows, step, "half", infra.activation_checkpointing)
    total = (counted.of_model + counted.recomputed) / len(workload.steps) / (peak * mfu)
    seen = step.row.half_seen / step.row.num_tokens**2  # a row was traced as one sequence

    def roofline(op: Op) -> float:
        computed = op.num_flops * (seen if class_of(op) == "attention" else 1.0)
        return max(computed / peak, op.num_bytes / bandwidth)

    shares, _ = kernel_seconds(step, workload, roofline)
    found = {name: total * value / sum(shares.values()) for name, value in shares.items()}
    if link is not None and infra.ranks > 1:
        travel = bytes_between_ranks(step, infra, len(workload.steps[0])) / link
        found["link"] = max(0.0, travel - total)
    return found


def assumed_mfu(hardware: MeasuredHardware | PublishedHardware, runs: list[PlanVsActual]) -> tuple[float, str]:
    """(share of the peak, why): the median of measured runs, where there are any."""
    if runs:
        count = f"{len(runs)} run{'s' if len(runs) > 1 else ''}"
        return median(run.measured.mfu_half for run in runs), f"the median of {count} on this hardware"
    match hardware:
        case PublishedHardware():
            return hardware.assumed_mfu, f"assumed: {hardware.assumed_because}"
        case MeasuredHardware():
            assert hardware.assumed_mfu is not None, "kernels that are not timed need an assumption"
            return hardware.assumed_mfu, "assumed by infra.hardware.assumed_mfu, until runs here have been measured"


def _by_class(trace: Trace, seconds: Callable[[Op], float]) -> dict[str, float]:
    found: dict[str, float] = defaultdict(float)
    for op, count in trace.ops.items():
        found[class_of(op)] += seconds(op) * count
    return found


def _shares(row: Row, traced: Row) -> dict[str, float]:
    tokens = row.num_tokens / traced.num_tokens
    return {
        "gemm": tokens,
        "elementwise": tokens,
        "attention": row.full_seen / traced.full_seen,
        "head": row.num_targets / max(1, traced.num_targets),
    }
