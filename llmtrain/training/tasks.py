"""What is particular to a trainer: its module, its steps, how it is judged, and what it is judged against."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from transformers import PreTrainedModel

from llmtrain.config.infra import Infra
from llmtrain.config.trainer import DPOTrainer, PretrainTrainer
from llmtrain.data.preferences import PreferencePairs
from llmtrain.data.text import Ids, TokenShards
from llmtrain.report.records import Margins
from llmtrain.telemetry.progress import Progress
from llmtrain.training.batches import PairSteps, TextSteps
from llmtrain.training.evaluation import language_loss, preference_figures, score_pairs, unigram_baseline
from llmtrain.training.losses import accuracy
from llmtrain.training.module import DirectPreference, Pretraining, TokenClock
from llmtrain.training.reference import reference_log_probs
from llmtrain.training.resolve import Inputs
from llmtrain.training.samples import pair_prompts, text_prompts

Figures = dict[str, float]
Heldout = Literal["validation", "test"]


@dataclass(frozen=True)
class Task:
    """One kind of training, ready to start."""

    module: TokenClock
    steps: TextSteps | PairSteps
    evaluate: Callable[[Heldout], Figures]
    """The figures of a split under the module's present weights."""
    baselines: Callable[[], Figures]
    """What the last figures are held against, on the test split; to be called before training."""
    prompts: list[Ids]
    """Held-out text for the model to continue."""


def pretraining(model: PreTrainedModel, trainer: PretrainTrainer, infra: Infra, inputs: Inputs, outputs: Path) -> Task:
    """Next-token prediction, judged by held-out loss, held against a unigram model."""
    directory = outputs / inputs.text.path
    shards = {split: TokenShards(directory, split) for split in ("train", "validation", "test")}
    steps = TextSteps(shards["train"], trainer, infra.micro_batch_tokens)
    module = Pretraining(model, trainer, infra, total_tokens=steps.tokens_before(len(steps)))

    def evaluate(split: Heldout) -> Figures:
        return language_loss(model, shards[split], inputs.text.splits[split], trainer.sequence_tokens, infra)

    def baselines() -> Figures:
        found = unigram_baseline(shards["train"], shards["test"], inputs.text.splits["test"], model.config.vocab_size)
        return {f"unigram/{name}": value for name, value in found.items()}

    return Task(module, steps, evaluate, baselines, text_prompts(shards["validation"]))


def preference(
    model: PreTrainedModel, trainer: DPOTrainer, infra: Infra, inputs: Inputs, outputs: Path, directory: Path
) -> Task:
    """DPO from `model`, which is the reference too; judged by held-out pairs and by what it cost in language.

    Each evaluation leaves the margin of every pair in the run's `directory`, as margins.json.
    """
    assert inputs.pairs is not None
    assert inputs.parent is not None
    splits = {split: PreferencePairs(outputs / inputs.pairs.path, split) for split in ("train", "validation", "test")}
    text = {split: TokenShards(outputs / inputs.text.path, split) for split in ("validation", "test")}
    num_tokens = sum(pairs.num_tokens(index) for pairs in splits.values() for index in range(len(pairs)))
    progress = Progress(num_tokens, "reference")
    reference = reference_log_probs(
        model,
        splits,
        weights_sha256=inputs.parent.model.weights_sha256,
        pairs_sha256=inputs.pairs.content_sha256,
        infra=infra,
        outputs=outputs,
        progress=progress.update,
    )
    progress.done()
    steps = PairSteps(splits["train"], reference["train"], trainer, infra.micro_batch_tokens)
    module = DirectPreference(model, trainer, infra, total_tokens=steps.tokens_before(len(steps)))

    def heldout(split: str) -> Figures:
        found = language_loss(model, text[split], inputs.text.splits[split], trainer.sequence_tokens, infra)
        return {f"heldout_{name}": value for name, value in found.items()}

    def evaluate(split: Heldout) -> Figures:
        policy = score_pairs(model, splits[split], list(range(len(splits[split]))), infra)
        before, after = (scores.chosen - scores.rejected for scores in (reference[split], policy))
        margins = Margins(split=split, beta=trainer.beta, before=tuple(before.tolist()), after=tuple(after.tolist()))
        margins.write(directory / "margins.json")
        return preference_figures(policy, reference[split], trainer.beta) | heldout(split)

    def baselines() -> Figures:
        scores = reference["test"].chosen - reference["test"].rejected
        share, standard_error = accuracy(scores)
        return {
            "base/accuracy": share,
            "base/accuracy_se": standard_error,
            "longer/accuracy": splits["test"].longer_is_chosen_accuracy(),
            **{f"base/{name}": value for name, value in heldout("test").items()},
        }

    return Task(module, steps, evaluate, baselines, pair_prompts(splits["validation"]))
