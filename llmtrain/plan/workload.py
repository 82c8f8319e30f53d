"""What passes through the model: how long the sequences are and how they share micro-batches."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING

from llmtrain.artifacts import DatasetManifest
from llmtrain.config.data import Continuations, PreferenceData
from llmtrain.config.root import TrainConfig
from llmtrain.config.trainer import DistillTrainer, DPOTrainer, PretrainTrainer, SFTTrainer

if TYPE_CHECKING:
    from llmtrain.models.packed import Packed  # imports torch, which estimates need not wait for


@dataclass(frozen=True)
class Row:
    """A micro-batch without its numbers: one packed row."""

    segments: tuple[tuple[int, int], ...]
    """(tokens, tokens of context) of each segment, as in `llmtrain.models.packed`"""
    owners: tuple[int, ...]
    """Targets of each sequence or answer"""

    @property
    def num_tokens(self) -> int:
        return sum(length for length, _ in self.segments)

    @property
    def num_targets(self) -> int:
        return sum(self.owners)

    @property
    def half_seen(self) -> float:
        """Pairs of tokens of which one sees the other: half of those within a segment, and all of its context."""
        return sum(length * length / 2 + length * context for length, context in self.segments)

    @property
    def full_seen(self) -> int:
        """The same with all pairs within a segment, those that the causal mask hides too."""
        return sum(length * (length + context) for length, context in self.segments)


@dataclass(frozen=True)
class Workload:
    """A sample of the steps of a run, as one rank has them, and how many there are."""

    steps: tuple[tuple[Row, ...], ...]
    num_steps: int | None
    """Optimizer steps of the whole run; None where that depends on data that are not prepared"""
    num_tokens: int | None
    """Tokens of the whole run through all ranks"""
    known_from: str
    """Where the lengths are from, in words"""

    @property
    def largest(self) -> Row:
        """The micro-batch that takes most memory."""
        return max((row for step in self.steps for row in step), key=lambda row: (row.num_tokens, row.num_targets))

    @property
    def tokens_per_step(self) -> float:
        """Tokens of a mean step, on one rank."""
        return sum(row.num_tokens for step in self.steps for row in step) / len(self.steps)

    def cut(self, micro_batch_tokens: int) -> "Workload":
        """The same with rows of at most so many tokens, or one sequence; a prompt stays with its answers."""
        steps = tuple(tuple(part for row in step for part in _cut(row, micro_batch_tokens)) for step in self.steps)
        return replace(self, steps=steps)


def _cut(row: Row, limit: int) -> list[Row]:
    trees: list[Row] = []
    owners = iter(row.owners)
    for segment in row.segments:
        if segment[1] and trees:
            trees[-1] = joined([trees[-1], Row((segment,), (next(owners, 0),))])
        else:
            trees.append(Row((segment,), (next(owners, 0),)))
    parts: list[list[Row]] = [[]]
    for tree in trees:
        if parts[-1] and sum(part.num_tokens for part in parts[-1]) + tree.num_tokens > limit:
            parts.append([])
        parts[-1].append(tree)
    return [joined(part) for part in parts]


def row_of(packed: "Packed") -> Row:
    """A real micro-batch, without its numbers."""
    segments = [(stop - start, above - below) for start, stop, below, above in packed.segments.tolist()]
    return Row(tuple(segments), tuple(packed.counts))


def estimated(config: TrainConfig, manifest: DatasetManifest | None = None) -> Workload:
    """The workload as far as the config, and the counts of prepared data where there are any, tell."""
    trainer, train = config.trainer, manifest.splits["train"] if manifest else None
    steps: int | None
    match trainer:
        case PretrainTrainer(packing="stream") | DistillTrainer():
            rows = [_documents([trainer.sequence_tokens])] * trainer.batch_rows
            steps = trainer.budget_tokens // (trainer.batch_rows * trainer.sequence_tokens)
            known = "trainer.sequence_tokens and trainer.batch_rows: exact"
        case PretrainTrainer():
            mean = train.num_tokens // train.num_documents if train else trainer.sequence_tokens // 4
            rows = [_documents(_filled(trainer.sequence_tokens, mean))] * trainer.batch_rows
            steps = trainer.budget_tokens // (trainer.batch_rows * trainer.sequence_tokens)
            known = f"rows full of documents of {mean} tokens, {_which(train)}"
        case SFTTrainer():
            mean = train.num_tokens // train.num_documents if train else trainer.sequence_tokens // 4
            lengths = _filled(trainer.sequence_tokens, mean)
            rows = [Row(_documents(lengths).segments, tuple(length // 2 for length in lengths))] * trainer.batch_rows
            steps = -(-train.num_tokens * trainer.epochs // (sum(lengths) * trainer.batch_rows)) if train else None
            known = f"rows full of chats of {mean} tokens, half of them the assistant's, {_which(train)}"
        case DPOTrainer():
            prompt, answer = _pair_lengths(config, manifest)
            rows = [Row(((prompt + answer - 1, 0), (answer - 1, prompt)), (answer, answer))] * trainer.batch_rows
            pairs = train.num_documents if train else None
            steps = -(-pairs * trainer.epochs // trainer.batch_rows) if pairs else None
            known = f"pairs of {prompt} prompt tokens and answers of {answer}, {_which(train)}"
    step = _on_one_rank(rows, config.infra.micro_batch_tokens, config.infra.ranks)
    tokens = sum(row.num_tokens for row in rows)
    return Workload((step,), steps, steps * tokens if steps else None, known)


def sampled(steps: Sequence[Sequence[Row]], num_steps: int, num_tokens: int, ranks: int) -> Workload:
    """The workload of prepared data, from some steps of all ranks: rank 0 takes each `ranks`-th micro-batch."""
    return Workload(
        tuple(tuple(step[::ranks]) for step in steps), num_steps, num_tokens, f"{len(steps)} steps of the prepared data"
    )


def joined(rows: Sequence[Row]) -> Row:
    """Rows one after the other in one."""
    return Row(tuple(s for row in rows for s in row.segments), tuple(o for row in rows for o in row.owners))


def _on_one_rank(rows: Sequence[Row], limit: int, ranks: int) -> tuple[Row, ...]:
    """Equal rows in as few micro-batches as fit, spread evenly; those that rank 0 has."""
    at_once = max(1, limit // rows[0].num_tokens)
    number = ranks * -(-len(rows) // (at_once * ranks))
    bounds = [len(rows) * n // number for n in range(number + 1)]
    groups = [rows[a:b] for a, b in pairwise(bounds)]
    return tuple(joined(group) for group in groups[::-1][::ranks] if group)


def _documents(lengths: Sequence[int]) -> Row:
    """Each token of input has a target; the last target is no input."""
    return Row(tuple((length, 0) for length in lengths), tuple(lengths))


def _filled(capacity: int, length: int) -> list[int]:
    length = max(2, min(length, capacity))
    rest = capacity % length
    return [length] * (capacity // length) + ([rest] if rest > 1 else [])


def _pair_lengths(config: TrainConfig, manifest: DatasetManifest | None) -> tuple[int, int]:
    """(tokens of a prompt, of an answer)."""
    room = config.trainer.sequence_tokens
    share = 0.5
    if isinstance(config.data, PreferenceData) and isinstance(config.data.pairs, Continuations):
        sizes = config.data.pairs.prompt_characters, config.data.pairs.answer_characters
        share = sizes[0] / sum(sizes)
    if manifest:
        split = manifest.splits["train"]
        pair = split.num_tokens / split.num_documents  # prompt and both answers
        answer = pair / (2 + share / (1 - share))
        return max(1, round(pair - 2 * answer)), max(2, round(answer))
    prompt = min(max(1, round(room * share)), room - 2)
    return prompt, room - prompt


def _which(counts: object) -> str:
    return "the mean of the prepared data" if counts else "a guess: the data are not prepared"
