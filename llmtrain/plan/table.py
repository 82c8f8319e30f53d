"""Plans for people."""

from llmtrain.plan.records import Convention, Plan


def page(plan: Plan) -> str:
    """One plan, with units, in about thirty lines."""
    half, full = plan.causal_half, plan.causal_full
    memory = {**plan.memory.model_dump(), "process": plan.process_bytes, "fragmentation": plan.fragmentation_bytes}
    parts = "   ".join(f"{name} {_bytes(size)}" for name, size in memory.items() if size)
    classes = sorted(plan.seconds_by_class.items(), key=lambda item: -item[1])
    shares = "   ".join(f"{name} {value / plan.seconds_per_step:.0%}" for name, value in classes if value)
    ranks = f", {plan.ranks} ranks, {plan.strategy}" if plan.ranks > 1 else ""
    lines = [
        f"{plan.name} on {plan.hardware}{ranks}",
        "",
        f"parameters   {plan.parameters:,} ({plan.parameters_without_embeddings:,} without embeddings), "
        f"{plan.trained_parameters:,} trained",
        f"work         {_count(plan.tokens, 'tokens')} in {_count(plan.steps, 'steps')}, "
        f"{plan.tokens_per_step:,.0f} tokens a step; {plan.workload_from}",
        "",
        "FLOPs               forward/token   backward/token   total        MFU",
        _convention("causal half", half),
        _convention("causal in full", full),
    ]
    if half.recomputed_per_token:
        lines.append(f"  besides, activation checkpointing computes {_si(half.recomputed_per_token)}FLOP a token again")
    lines += [
        "",
        f"memory       {_bytes(plan.peak_bytes)} of {_bytes(plan.capacity_bytes)} on each rank: "
        f"{'fits' if plan.fits else 'does NOT fit'}"
        + (f"; {_bytes(plan.host_bytes)} in the host's memory" if plan.host_bytes else ""),
        f"             {parts}",
        f"             largest infra.micro_batch_tokens that fits: {plan.largest_micro_batch_tokens or 'none'}",
        *(f"             would fit: {remedy}" for remedy in plan.remedies),
        "",
        f"time         {plan.seconds_per_step:.3g} s a step, {plan.tokens_per_second:,.0f} tokens/s, "
        f"{_duration(plan.eta_seconds)} in all, evaluations and preparation besides",
        f"             {shares}",
        f"speed from   {plan.mfu_because}",
        f"bound by     {plan.bound_by}",
        f"energy       {_energy(plan.watt_hours) if plan.watt_hours else 'unknown: say infra.hardware.watts'}",
        f"cost         {_cost(plan.cost_usd) if plan.cost_usd else 'unknown: say infra.hardware.price_per_hour'}",
    ]
    return "\n".join(lines)


def figures(plan: Plan) -> dict[str, str]:
    """What two plans are compared by, in words, by name."""
    half, full = (_si(found.total) + "FLOP" if found.total else "-" for found in (plan.causal_half, plan.causal_full))
    memory = f"{_bytes(plan.peak_bytes)} of {_bytes(plan.capacity_bytes)}"
    return {
        "parameters": f"{plan.parameters:,}",
        "trained parameters": f"{plan.trained_parameters:,}",
        "steps": "-" if plan.steps is None else f"{plan.steps:,}",
        "FLOPs, causal half": half,
        "FLOPs, causal in full": full,
        "memory": memory + ("" if plan.fits else ": does NOT fit"),
        "time a step": f"{plan.seconds_per_step:.3g} s",
        "time in all": _duration(plan.eta_seconds) if plan.eta_seconds else "-",
        "cost": _cost(plan.cost_usd) if plan.cost_usd is None or plan.cost_usd >= 0.01 else "under $0.01",
    }


def comparison(plans: dict[str, Plan | str]) -> str:
    """One line for each option of `infra`; a text instead of a plan says why there is none."""
    lines = [
        f"{'infra':12} {'memory':>18} {'fits':>5} {'s/step':>9} {'tokens/s':>11} {'in all':>9} {'energy':>9} "
        f"{'cost':>9}"
    ]
    for name, plan in plans.items():
        if isinstance(plan, str):
            lines.append(f"{name:12} {plan.splitlines()[0]}")
            continue
        memory = f"{_bytes(plan.peak_bytes)} of {_bytes(plan.capacity_bytes)}"
        lines.append(
            f"{name:12} {memory:>18} {'yes' if plan.fits else 'NO':>5} {plan.seconds_per_step:>9.3g} "
            f"{plan.tokens_per_second:>11,.0f} {_duration(plan.eta_seconds):>9} {_energy(plan.watt_hours):>9} "
            f"{_cost(plan.cost_usd):>9}"
        )
    return "\n".join(lines)


def _convention(name: str, found: Convention) -> str:
    total = _si(found.total) + "FLOP" if found.total else "unknown"
    forward, backward = f"{_si(found.forward_per_token)}FLOP", f"{_si(found.backward_per_token)}FLOP"
    return f"  {name:16}  {forward:14}  {backward:15}  {total:11}  {found.mfu:.1%}"


def _si(value: float) -> str:
    """Three digits and the unit's prefix."""
    for prefix in ("", "k", "M", "G", "T", "P", "E", "Z"):
        if value < 1000:
            return f"{value:.3g} {prefix}"
        value /= 1000
    return f"{value:.3g} Y"


def _bytes(value: float) -> str:
    return f"{value / 2**30:.1f} GiB" if value >= 2**30 else f"{value / 2**20:.0f} MiB"


def _count(value: int | None, unit: str) -> str:
    return f"an unknown number of {unit}" if value is None else f"{value:,} {unit}"


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return "unknown"
    if seconds < 1:
        return "under 1 s"
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _energy(watt_hours: float | None) -> str:
    if watt_hours is None:
        return "-"
    return f"{watt_hours:.0f} Wh" if watt_hours < 1e4 else f"{watt_hours / 1000:,.0f} kWh"


def _cost(dollars: float | None) -> str:
    return "-" if dollars is None else f"${dollars:,.2f}"
