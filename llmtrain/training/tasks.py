"""What is particular to a trainer: its module, its steps, how it is judged, and what it is judged against."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from transformers import PreTrainedModel

from llmtrain.config.adapter import Adapter, NoAdapter, QLoRAAdapter
from llmtrain.config.infra import Infra
from llmtrain.config.root import TrainConfig
from llmtrain.config.trainer import DistillTrainer, DPOTrainer, PretrainTrainer, SFTTrainer, Trainer
from llmtrain.data.chats import ChatRows
from llmtrain.data.order import shuffled
from llmtrain.data.preferences import PreferencePairs
from llmtrain.data.text import Ids, TokenShards
from llmtrain.data.votes import votes
from llmtrain.models import attention
from llmtrain.models import directory as model_directory
from llmtrain.models.adapter import attach
from llmtrain.models.logprobs import check_log_probs
from llmtrain.report.records import Margins
from llmtrain.telemetry.progress import Progress
from llmtrain.training import device
from llmtrain.training.batches import ChatSteps, PairSteps, Steps, TextSteps
from llmtrain.training.evaluation import (
    chat_loss,
    judged,
    language_loss,
    preference_figures,
    score_pairs,
    unigram_baseline,
    vote_figures,
)
from llmtrain.training.losses import accuracy, bits_per_byte
from llmtrain.training.module import CrossEntropy, DirectPreference, Distillation, TokenClock, Votes
from llmtrain.training.preference_losses import REFERENCE_FREE
from llmtrain.training.reference import reference_log_probs
from llmtrain.training.resolve import Inputs
from llmtrain.training.samples import pair_prompts, spread_prompts, text_prompts
from llmtrain.training.teacher import Text, student_figures, teacher_rows, unigram_divergence

Figures = dict[str, float]
Heldout = Literal["validation", "test"]


@dataclass(frozen=True)
class Task:
    """One kind of training, ready to start."""

    module: TokenClock
    steps: Steps
    evaluate: Callable[[Heldout], Figures]
    """The figures of a split under the module's present weights; `loss` chooses the best checkpoint."""
    baselines: Callable[[], Figures]
    """What the last figures are held against, on the test split; to be called before training."""
    prompts: list[Ids]
    """Held-out text for the model to continue."""


def pretraining(
    model: PreTrainedModel, trainer: PretrainTrainer, config: TrainConfig, inputs: Inputs, outputs: Path
) -> Task:
    """Next-token prediction, judged by held-out loss, held against a unigram model."""
    infra, text = config.infra, inputs.text
    directory = outputs / text.path
    shards = {split: TokenShards(directory, split) for split in ("train", "validation", "test")}
    steps = TextSteps(shards["train"], trainer, trainer.budget_tokens, trainer.packing, infra)
    _with_adapter(model, config.adapter)
    module = CrossEntropy(model, trainer, infra, total_tokens=steps.tokens_before(len(steps)))

    def evaluate(split: Heldout) -> Figures:
        return language_loss(model, shards[split], text.splits[split], trainer.sequence_tokens, infra)

    def baselines() -> Figures:
        found = unigram_baseline(shards["train"], shards["test"], text.splits["test"], model.config.vocab_size)
        return {f"unigram/{name}": value for name, value in found.items()}

    return Task(module, steps, evaluate, baselines, text_prompts(shards["validation"]))


def supervised(model: PreTrainedModel, trainer: SFTTrainer, config: TrainConfig, inputs: Inputs, outputs: Path) -> Task:
    """Fine-tuning on chats, judged by the loss on held-out answers and by what it cost in language."""
    assert inputs.chats is not None
    infra = config.infra
    chats = {split: ChatRows(outputs / inputs.chats.path, split) for split in ("train", "validation", "test")}
    heldout = _heldout_text(model, trainer, infra, inputs, outputs)
    steps = ChatSteps(chats["train"], trainer, infra)
    _with_adapter(model, config.adapter)
    module = CrossEntropy(model, trainer, infra, total_tokens=steps.tokens_before(len(steps)))

    def evaluate(split: Heldout) -> Figures:
        return chat_loss(model, chats[split], infra) | heldout(split)

    def baselines() -> Figures:
        return {f"base/{name}": value for name, value in evaluate("test").items()}

    prompts = spread_prompts(len(chats["validation"]), chats["validation"].prompt_ids)
    return Task(module, steps, evaluate, baselines, prompts)


def preference(
    model: PreTrainedModel,
    trainer: DPOTrainer,
    config: TrainConfig,
    inputs: Inputs,
    outputs: Path,
    directory: Path | None,
) -> Task:
    """DPO, or another of its family, from `model`, which is the reference too; judged by held-out pairs and by what it
    cost in language.

    Each evaluation leaves the margin of every pair in the run's `directory`, where there is one, as margins.json.
    """
    assert inputs.pairs is not None
    assert inputs.parent is not None
    infra, prepared = config.infra, outputs / inputs.pairs.path

    def of_split(split: str) -> PreferencePairs:
        if trainer.loss == "kto":
            return votes(prepared, split, trainer.sequence_tokens)
        return PreferencePairs(prepared, split)

    splits = {split: of_split(split) for split in ("train", "validation", "test")}
    num_tokens = sum(pairs.num_tokens(index) for pairs in splits.values() for index in range(len(pairs)))
    progress = Progress(num_tokens, "reference")
    reference = reference_log_probs(
        model,
        splits,
        weights_sha256=inputs.parent.weights_sha256,
        pairs_sha256=inputs.pairs.content_sha256,
        form=_form_of_reference(trainer, config.adapter),
        infra=infra,
        outputs=outputs,
        progress=progress.update,
    )
    progress.done()
    steps = PairSteps(splits["train"], reference["train"], trainer, infra)
    heldout = _heldout_text(model, trainer, infra, inputs, outputs)
    _with_adapter(model, config.adapter)
    module_class = Votes if trainer.loss == "kto" else DirectPreference
    module = module_class(model, trainer, infra, total_tokens=steps.tokens_before(len(steps)))

    def evaluate(split: Heldout) -> Figures:
        pairs, known = splits[split], reference[split]
        policy = score_pairs(model, pairs, list(range(len(pairs))), infra)
        if trainer.loss == "kto":
            return vote_figures(policy, known, pairs, trainer) | heldout(split)
        before, after = (scores.chosen - scores.rejected for scores in (known, policy))
        rewards = judged(policy, known, pairs, trainer)[1].margins if trainer.loss in REFERENCE_FREE else None
        if directory is not None:
            Margins(
                split=split,
                beta=trainer.beta,
                before=tuple(before.tolist()),
                after=tuple(after.tolist()),
                rewards=None if rewards is None else tuple(rewards.tolist()),
            ).write(directory / "margins.json")
        return preference_figures(policy, known, pairs, trainer) | heldout(split)

    def baselines() -> Figures:
        figures, known = {f"base/{name}": value for name, value in heldout("test").items()}, reference["test"]
        if trainer.loss == "kto":
            votes_of = [splits["test"].is_desirable(index) for index in range(len(splits["test"]))]
            desirable = sum(map(bool, votes_of)) / len(votes_of)
            started = vote_figures(known, known, splits["test"], trainer)
            return {"commoner/accuracy": max(desirable, 1 - desirable), "base/loss": started["loss"]} | figures
        started = preference_figures(known, known, splits["test"], trainer)
        share, standard_error = accuracy(known.chosen - known.rejected)
        return {
            "base/loss": started["loss"],
            "base/margin": started["margin"],
            "base/accuracy": share,
            "base/accuracy_se": standard_error,
            "longer/accuracy": splits["test"].longer_is_chosen_accuracy(),
            **figures,
        }

    return Task(module, steps, evaluate, baselines, pair_prompts(splits["validation"]))


def distillation(
    model: PreTrainedModel, trainer: DistillTrainer, config: TrainConfig, inputs: Inputs, outputs: Path
) -> Task:
    """Learning from a teacher, judged by the divergence from it and by the held-out loss, held against a unigram model
    and the teacher itself."""
    assert inputs.teacher is not None
    infra, text, teacher_directory = config.infra, inputs.text, inputs.teacher.directory
    shards = {split: TokenShards(outputs / text.path, split) for split in ("train", "validation", "test")}
    steps = TextSteps(shards["train"], trainer, trainer.budget_tokens, "stream", infra)
    num_visited = min(len(steps) * trainer.batch_rows, steps.num_rows)
    visited = sorted(shuffled(position, steps.num_rows, trainer.seed) for position in range(num_visited))
    texts = {
        split: Text(shards[split], trainer.sequence_tokens, visited if split == "train" else None) for split in shards
    }

    def teacher() -> PreTrainedModel:
        network = model_directory.load(teacher_directory).to(infra.accelerator)
        attention.use(network, device.attention_kernel(infra))
        check_log_probs(network)
        return network

    progress = Progress(sum(len(part.rows) for part in texts.values()) * trainer.sequence_tokens, "teacher")
    known = teacher_rows(
        teacher,
        texts,
        trainer,
        vocab_size=model.get_output_embeddings().weight.shape[0],
        weights_sha256=inputs.teacher.weights_sha256,
        text_sha256=text.content_sha256,
        infra=infra,
        outputs=outputs,
        progress=progress.update,
    )
    progress.done()
    _with_adapter(model, config.adapter)
    module = Distillation(model, trainer, infra, steps.tokens_before(len(steps)), known["train"])

    def evaluate(split: Heldout) -> Figures:
        figures, num_targets = student_figures(model, texts[split], known[split], trainer, infra)
        num_bytes = text.splits[split].num_bytes
        return figures | {"heldout_bits_per_byte": bits_per_byte(figures["heldout_loss"], num_targets, num_bytes)}

    def baselines() -> Figures:
        counts, vocab_size = text.splits["test"], model.get_output_embeddings().weight.shape[0]
        unigram = unigram_baseline(shards["train"], shards["test"], counts, vocab_size)
        of_teacher = language_loss(teacher(), shards["test"], counts, trainer.sequence_tokens, infra)
        spread = unigram_divergence(
            shards["train"].token_counts(vocab_size), texts["test"], known["test"], trainer, infra
        )
        named = [("unigram", unigram), ("teacher", of_teacher)]
        found = {f"{who}/heldout_{name}": value for who, figures in named for name, value in figures.items()}
        return found | {"unigram/divergence": spread}

    return Task(module, steps, evaluate, baselines, text_prompts(shards["validation"]))


def _form_of_reference(trainer: DPOTrainer, adapter: Adapter) -> list[Any]:
    """What decides the reference's log-probabilities beside weights, pairs and precision."""
    found: list[Any] = [trainer.loss, trainer.sequence_tokens] if trainer.loss == "kto" else []
    if isinstance(adapter, QLoRAAdapter):
        found += [adapter.quantization, adapter.double_quantization]
    return found


def _heldout_text(
    model: PreTrainedModel, trainer: Trainer, infra: Infra, inputs: Inputs, outputs: Path
) -> Callable[[str], Figures]:
    """The language loss of a split of the corpus: what tuning may cost."""
    text = {split: TokenShards(outputs / inputs.text.path, split) for split in ("validation", "test")}

    def measure(split: str) -> Figures:
        found = language_loss(model, text[split], inputs.text.splits[split], trainer.sequence_tokens, infra)
        return {f"heldout_{name}": value for name, value in found.items()}

    return measure


def _with_adapter(model: PreTrainedModel, adapter: Adapter) -> None:
    match adapter:
        case NoAdapter():
            return
        case _:
            attach(model, adapter)
