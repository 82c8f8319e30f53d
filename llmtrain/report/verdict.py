"""What a run came to: each figure beside its baselines, and one sentence about them."""

import math
from dataclasses import dataclass

from llmtrain.config.trainer import DPOTrainer
from llmtrain.report.facts import Facts


@dataclass(frozen=True)
class Figure:
    """A figure on held-out data and what it is held against."""

    name: str
    unit: str
    value: float
    baseline: str
    baseline_value: float
    higher_is_better: bool = False
    error: float = 0.0
    """Standard error of `value`."""

    @property
    def difference(self) -> float:
        return self.value - self.baseline_value

    @property
    def is_better(self) -> bool | None:
        """Than the baseline, by more than the standard error; None where that cannot be told."""
        if not abs(self.difference) > self.error:  # also where one of them is not a number
            return None
        return (self.difference > 0) == self.higher_is_better


def figures(facts: Facts) -> tuple[str, list[Figure]]:
    """The split that they were measured on, and the latest figures; none before the first evaluation.

    The baselines are of the test split, and so are the figures of a finished run.
    """
    if facts.trained:
        split, found = "test", facts.trained.metrics
    else:
        split, found = "validation", next((row for row in reversed(facts.rows) if "validation/loss" in row), {})
    values = {name.removeprefix(f"{split}/"): value for name, value in found.items() if name.startswith(f"{split}/")}
    if not values:
        return split, []
    base = facts.baselines
    if not isinstance(facts.frozen.config.trainer, DPOTrainer):
        unigram = "a unigram model"
        return split, [
            Figure("Held-out loss", "nats per token", values["loss"], unigram, base.get("unigram/loss", math.nan)),
            Figure("Held-out loss", "bits per byte", values["bits_per_byte"], unigram,
                   base.get("unigram/bits_per_byte", math.nan)),
        ]  # fmt: skip
    share, error = values["accuracy"], values["accuracy_se"]
    before = "the base model"
    return split, [
        *(
            Figure("Preference accuracy", "share of pairs", share, name, baseline, higher_is_better=True, error=error)
            for name, baseline in accuracy_baselines(base).items()
        ),
        Figure("Reward margin", "nats", values["margin"], before, 0.0, higher_is_better=True),
        Figure("Chosen answers", "nats an answer", values["chosen_logp_change"], before, 0.0, higher_is_better=True),
        Figure("Held-out loss", "nats per token", values["heldout_loss"], before,
               base.get("base/heldout_loss", math.nan)),
        Figure("Held-out loss", "bits per byte", values["heldout_bits_per_byte"], before,
               base.get("base/heldout_bits_per_byte", math.nan)),
    ]  # fmt: skip


def accuracy_baselines(baselines: dict[str, float]) -> dict[str, float]:
    """What a preference accuracy has to beat, by name."""
    found = {"a coin": 0.5}
    for name, key in (("the longer answer", "longer/accuracy"), ("the base model", "base/accuracy")):
        if key in baselines:
            found[name] = baselines[key]
    return found


def verdict(facts: Facts) -> str:
    """One sentence or two: how the run stands against what it must beat, and what that cost."""
    split, found = figures(facts)
    if not found:
        return "Just begun: nothing is evaluated yet."
    end = "" if split == "test" else " So far, and on the validation split."
    if not isinstance(facts.frozen.config.trainer, DPOTrainer):
        loss = found[0]
        return (
            f"{loss.value:.3f} nats per token on held-out text, {abs(loss.difference):.3f} "
            f"{'below' if loss.difference < 0 else 'above'} {loss.baseline} ({loss.baseline_value:.3f}).{end}"
        )
    accuracies = [figure for figure in found if figure.name == "Preference accuracy"]
    hardest = max(accuracies, key=lambda figure: figure.baseline_value)
    (loss,) = (figure for figure in found if figure.unit == "nats per token")
    change = loss.difference / loss.baseline_value
    language = (
        f"{'rose' if change > 0 else 'fell'} by {abs(change):.1%}" if abs(change) >= 0.0005 else "stayed as it was"
    )
    words = {True: "above", False: "below", None: "within a standard error of"}[hardest.is_better]
    return (
        f"Prefers the chosen answer in {hardest.value:.1%} ± {hardest.error:.1%} of held-out pairs, {words} "
        f"{hardest.baseline} ({hardest.baseline_value:.1%}). The held-out language loss {language}.{end}"
    )
