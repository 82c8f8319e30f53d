"""Did the plan come true? `plan.json` of a run, and what was measured beside it: `plan_vs_actual.json`."""

from collections.abc import Sequence
from pathlib import Path
from statistics import mean, median

from llmtrain.files import write_whole
from llmtrain.plan.records import Figures, PlanVsActual, Prediction

PLAN_FILE, FILE = "plan.json", "plan_vs_actual.json"
WARM_UP_STEPS = 3
"""Steps left out where there are more: the first ones fill caches and grow the heap."""


def predict(directory: Path, prediction: Prediction) -> None:
    """Keep in a run's directory what its first step begins with."""
    write_whole(directory / PLAN_FILE, prediction.model_dump_json(indent=2) + "\n")


def predicted(directory: Path) -> Prediction | None:
    """What was kept; None of a run that is older than plans, or where the file is damaged: no run depends on it."""
    try:
        return Prediction.model_validate_json((directory / PLAN_FILE).read_bytes())
    except (OSError, ValueError):
        return None


def record(
    directory: Path,
    prediction: Prediction,
    step_seconds: Sequence[float],
    step_tokens: Sequence[int],
    peak_bytes: int,
    product_seconds: Sequence[float] = (),
) -> PlanVsActual | None:
    """Write what came of `prediction`; None, and no file, where no step was taken.

    `step_seconds` and `step_tokens` are those of the steps that this process took, evaluation and saving left out;
    `peak_bytes` is `machine.peak_bytes` at the end of training, `product_seconds` of `machine.Probe` in between.
    """
    taken = list(zip(step_seconds, step_tokens, strict=True))
    taken = taken[WARM_UP_STEPS:] or taken
    if not taken:
        return None
    per_token = median(seconds / tokens for seconds, tokens in taken)
    seconds = per_token * prediction.tokens_per_step
    peak_flops = prediction.peak_flops_per_second
    measured = Figures(
        peak_bytes=peak_bytes,
        seconds_per_step=seconds,
        tokens_per_second=1 / per_token,
        mfu_half=prediction.flops_per_token_half / per_token / peak_flops,
        mfu_full=prediction.flops_per_token_full / per_token / peak_flops,
    )
    found = PlanVsActual(
        prediction=prediction,
        measured=measured,
        num_steps=len(taken),
        peak_error=prediction.predicted.peak_bytes / peak_bytes - 1,
        seconds_error=prediction.predicted.seconds_per_step / seconds - 1,
        product_seconds=mean(product_seconds) if product_seconds else None,
    )
    write_whole(directory / FILE, found.model_dump_json(indent=2) + "\n")
    return found


def in_words(found: PlanVsActual) -> str:
    """One line for the end of a run."""
    predicted, measured = found.prediction.predicted, found.measured
    return (
        f"plan and actual: peak memory {predicted.peak_bytes / 2**20:,.0f} and {measured.peak_bytes / 2**20:,.0f} MiB "
        f"({found.peak_error:+.1%}), a step {predicted.seconds_per_step:.3g} and {measured.seconds_per_step:.3g} s "
        f"({found.seconds_error:+.1%}), MFU {measured.mfu_half:.1%} with causal attention halved, "
        f"{measured.mfu_full:.1%} in full"
    )
