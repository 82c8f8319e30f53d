"""What a run came to: each figure beside its baselines, and one sentence about them."""

import math
from dataclasses import dataclass

from llmtrain.config.trainer import DistillTrainer, DPOTrainer, PretrainTrainer, SFTTrainer
from llmtrain.report.baselines import BASE, TEACHER, UNIGRAM, accuracy_baselines
from llmtrain.report.facts import Facts

NATS, BITS = "nats per token", "bits per byte"


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


def latest(facts: Facts) -> tuple[str, dict[str, float]]:
    """The split that was measured on, and the latest figures by name; none before the first evaluation.

    The baselines are of the test split, and so are the figures of a finished run.
    """
    if facts.trained:
        split, found = "test", facts.trained.metrics
    else:
        split, found = "validation", next((row for row in reversed(facts.rows) if "validation/loss" in row), {})
    return split, {name.removeprefix(f"{split}/"): found[name] for name in found if name.startswith(f"{split}/")}


def figures(facts: Facts) -> tuple[str, list[Figure]]:
    """The split that they were measured on, and the latest figures beside their baselines."""
    split, values = latest(facts)
    if not values:
        return split, []
    base, trainer = facts.baselines, facts.frozen.config.trainer

    def against(who: str, key: str, name: str, unit: str, metric: str, higher_is_better: bool = False) -> Figure:
        baseline = base.get(f"{key}/{metric}", math.nan)
        return Figure(name, unit, values[metric], who, baseline, higher_is_better)

    def language(who: str, key: str, prefix: str = "heldout_") -> list[Figure]:
        return [
            against(who, key, "Held-out loss", NATS, f"{prefix}loss"),
            against(who, key, "Held-out loss", BITS, f"{prefix}bits_per_byte"),
        ]

    match trainer:
        case PretrainTrainer():
            return split, language(UNIGRAM, "unigram", prefix="")
        case DistillTrainer():
            divergence = against(UNIGRAM, "unigram", "Divergence from the teacher", NATS, "divergence")
            return split, [*language(UNIGRAM, "unigram"), *language(TEACHER, "teacher"), divergence]
        case SFTTrainer():
            return split, [against(BASE, "base", "Loss on answers", NATS, "loss"), *language(BASE, "base")]
        case DPOTrainer():
            unit = "share of votes" if trainer.loss == "kto" else "share of pairs"
            accuracies = [
                Figure("Preference accuracy", unit, values["accuracy"], name, baseline, True, values["accuracy_se"])
                for name, baseline in accuracy_baselines(base).items()
            ]
            rewards = [
                Figure(name, unit, values[metric], BASE, base.get(baseline, 0.0), higher_is_better=True)
                for metric, name, unit, baseline in (
                    ("margin", "Reward margin", "nats", "base/margin"),
                    ("chosen_logp_change", _chosen(trainer), "nats an answer", ""),
                )
                if metric in values  # of votes one kind may be missing
            ]
            return split, [*accuracies, *rewards, *language(BASE, "base")]


@dataclass(frozen=True)
class Diagnostic:
    """What a preference margin can hide."""

    name: str
    value: float
    unit: str
    meaning: str


DIAGNOSTICS = (
    ("chosen_logp_change_per_token", "Chosen answers", "nats a token", "change from the reference; far below 0, "
     "they become unlikely too"),
    ("rejected_logp_change_per_token", "Rejected answers", "nats a token", "change from the reference"),
    ("accuracy_longer_chosen", "Accuracy where the longer answer is chosen", "share of pairs", ""),
    ("accuracy_shorter_chosen", "Accuracy where the shorter answer is chosen", "share of pairs", "far below the one "
     "above, the model prefers length"),
    ("margin_length_correlation", "Correlation of margin and length", "−1 to 1", "near 1, the margin is length"),
    ("kl_k3", "Distance from the reference", "nats a token", "k3 on held-out answers; large, it is another model"),
)  # fmt: skip


def diagnostics(facts: Facts) -> list[Diagnostic]:
    """Those that the latest figures have: of pairs."""
    _, values = latest(facts)
    return [Diagnostic(name, values[key], unit, meaning) for key, name, unit, meaning in DIAGNOSTICS if key in values]


def verdict(facts: Facts) -> str:
    """One sentence or two: how the run stands against what it must beat, and what that cost."""
    split, found = figures(facts)
    if not found:
        return "Just begun: nothing is evaluated yet."
    end = "" if split == "test" else " So far, and on the validation split."
    losses = [figure for figure in found if (figure.name, figure.unit) == ("Held-out loss", NATS)]
    match facts.frozen.config.trainer:
        case PretrainTrainer():
            return f"{_against(losses[0], 'held-out text')}{end}"
        case DistillTrainer():
            unigram, teacher = losses
            spread = found[-1]
            return (
                f"{_against(unigram, 'held-out text')[:-1]} and {_difference(teacher)}. The divergence from the "
                f"teacher is {spread.value:.3f} nats per token; {UNIGRAM}'s is {spread.baseline_value:.3f}.{end}"
            )
        case SFTTrainer():
            return f"{_against(found[0], 'held-out answers')} {_cost(losses[0])}{end}"
        case DPOTrainer() as trainer:
            accuracies = [figure for figure in found if figure.name == "Preference accuracy"]
            hardest = max(accuracies, key=lambda figure: figure.baseline_value)
            words = {True: "above", False: "below", None: "within a standard error of"}[hardest.is_better]
            what = "Judges as people did" if trainer.loss == "kto" else "Prefers the chosen answer in"
            units = "of held-out votes" if trainer.loss == "kto" else "of held-out pairs"
            return (
                f"{what} {hardest.value:.1%} ± {hardest.error:.1%} {units}, {words} {hardest.baseline} "
                f"({hardest.baseline_value:.1%}). {_cost(losses[0])}{end}"
            )


def _chosen(trainer: DPOTrainer) -> str:
    return "Desirable answers" if trainer.loss == "kto" else "Chosen answers"


def _against(loss: Figure, of: str) -> str:
    return f"{loss.value:.3f} nats per token on {of}, {_difference(loss)}."


def _difference(loss: Figure) -> str:
    words = "below" if loss.difference < 0 else "above"
    return f"{abs(loss.difference):.3f} {words} {loss.baseline} ({loss.baseline_value:.3f})"


def _cost(loss: Figure) -> str:
    """What tuning did to the language."""
    change = loss.difference / loss.baseline_value
    words = f"{'rose' if change > 0 else 'fell'} by {abs(change):.1%}" if abs(change) >= 0.0005 else "stayed as it was"
    return f"The held-out language loss {words}."
