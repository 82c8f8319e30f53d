"""Global batches by step: any step is reached in O(1), and its content depends on seed and data alone.

One item of a `Steps` data set is one optimizer step, cut into packed micro-batches that fit `infra.micro_batch_tokens`,
as many on each rank. Batches are not frozen: Lightning moves them to the device by setting their fields.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from heapq import heapreplace
from typing import Protocol, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from llmtrain.config.infra import Infra
from llmtrain.config.trainer import DPOTrainer, SFTTrainer, Trainer
from llmtrain.data.chats import ChatRows
from llmtrain.data.order import shuffled
from llmtrain.data.packing import best_fit, pieces
from llmtrain.data.preferences import PreferencePairs
from llmtrain.data.text import TokenShards
from llmtrain.models.logprobs import SAME_SHAPE
from llmtrain.models.packed import Packed, Tree, document, pack, pair


@dataclass(frozen=True)
class AnswerLogProbs:
    """ln p(answer | prompt), summed over the answer's tokens, for the pairs of one split in the split's order."""

    chosen: Tensor
    """[pairs] fp32, fp64 of an fp64 model"""
    rejected: Tensor
    """[pairs], as `chosen`"""


@dataclass
class MicroBatch:
    """What passes through the model at once."""

    packed: Packed
    indices: Tensor
    """[sequences or pairs] int64: which ones of the data set's split they are; rows of a corpus by their number"""
    reference: Tensor
    """[owners]: the log-probability of each answer under the reference, of pairs chosen before rejected; zeros where
    there is none; of other data empty"""
    is_desirable: Tensor
    """[owners] bool: of votes (KTO) whether the answer is; of other data empty"""
    mismatched: Packed | None = None
    """Of votes: the prompts with answers to other ones, from which KTO estimates its baseline"""
    mismatched_reference: Tensor | None = None
    """[owners of `mismatched`]: their log-probabilities under the reference"""


@dataclass
class StepBatch:
    """What one optimizer step trains on, over all ranks."""

    micro_batches: list[MicroBatch]
    """Those of all ranks: rank r of n takes each n-th, beginning with r; every rank has as many."""
    num_units: int
    """What the loss is normalised by: target tokens (text, chats), pairs or votes (preferences)."""
    num_tokens: int
    """What the clock advances by."""
    num_chosen_tokens: int = 0
    """Of pairs: the tokens of the chosen answers."""


class Steps(Protocol):
    """The steps of a run, as a data set."""

    def __len__(self) -> int: ...
    def __getitem__(self, step: int, /) -> StepBatch: ...
    def tokens_before(self, step: int) -> int:
        """What the clock says when `step` steps are done."""
        ...


class TextSteps(Dataset[StepBatch]):
    """Rows of text, reshuffled each time the corpus is through.

    `packing=stream`: the corpus end to end in rows of `sequence_tokens`. `documents`: whole documents, packed by best
    fit; the clock counts rows as full.
    """

    def __init__(self, shards: TokenShards, trainer: Trainer, budget_tokens: int, packing: str, infra: Infra) -> None:
        self.shards, self.trainer, self.budget_tokens, self.infra = shards, trainer, budget_tokens, infra
        self.step_tokens = trainer.batch_rows * trainer.sequence_tokens
        self.rows: list[list[tuple[int, int]]] | None = None
        if packing == "documents":
            self.rows = packed_documents(shards, trainer.sequence_tokens)
        self.num_rows = shards.num_rows(trainer.sequence_tokens) if self.rows is None else len(self.rows)

    def __len__(self) -> int:
        return self.budget_tokens // self.step_tokens

    def tokens_before(self, step: int) -> int:
        return step * self.step_tokens

    def row(self, index: int) -> list[Tree]:
        """The documents of a row; of a stream its tokens and the one that follows, as one."""
        if self.rows is None:
            return [document(self.shards.row(index, self.trainer.sequence_tokens))]
        return [document(self.shards.tokens(start, stop)) for start, stop in self.rows[index]]

    def __getitem__(self, step: int) -> StepBatch:
        first = step * self.trainer.batch_rows
        indices = [shuffled(p, self.num_rows, self.trainer.seed) for p in range(first, first + self.trainer.batch_rows)]
        micro_batches = packed_rows([self.row(index) for index in indices], indices, self.infra)
        num_targets = sum(len(micro_batch.packed.targets) for micro_batch in micro_batches)
        return StepBatch(micro_batches, num_units=num_targets, num_tokens=self.step_tokens)


class ChatSteps(Dataset[StepBatch]):
    """SFT: rows of packed chats over `epochs` passes; the last step may be smaller."""

    def __init__(self, chats: ChatRows, trainer: SFTTrainer, infra: Infra) -> None:
        self.chats, self.trainer, self.infra = chats, trainer, infra
        self.rows = best_fit([chats.num_tokens(index) for index in range(len(chats))], trainer.sequence_tokens)
        self.order = [shuffled(p, len(self.rows), trainer.seed) for p in range(len(self.rows) * trainer.epochs)]
        row_tokens = [sum(chats.num_tokens(index) for index in row) for row in self.rows]
        self.tokens_through = np.concatenate([[0], np.cumsum([row_tokens[row] for row in self.order])])

    def __len__(self) -> int:
        return -(-len(self.order) // self.trainer.batch_rows)

    def tokens_before(self, step: int) -> int:
        return int(self.tokens_through[min(step * self.trainer.batch_rows, len(self.order))])

    def row(self, index: int) -> list[Tree]:
        """The chats of a row."""
        chats = [self.chats[chat] for chat in self.rows[index]]
        return [document(chat.ids, chat.is_target) for chat in chats]

    def __getitem__(self, step: int) -> StepBatch:
        first = step * self.trainer.batch_rows
        indices = self.order[first : first + self.trainer.batch_rows]
        micro_batches = packed_rows([self.row(index) for index in indices], indices, self.infra)
        num_targets = sum(len(micro_batch.packed.targets) for micro_batch in micro_batches)
        return StepBatch(micro_batches, num_targets, self.tokens_before(step + 1) - self.tokens_before(step))


class PairSteps(Dataset[StepBatch]):
    """Preference tuning: `batch_rows` pairs a step over `epochs` passes; the last step may be smaller."""

    def __init__(
        self, pairs: PreferencePairs, reference: AnswerLogProbs | None, trainer: DPOTrainer, infra: Infra
    ) -> None:
        self.pairs, self.reference, self.trainer, self.infra = pairs, reference, trainer, infra
        positions = range(len(pairs) * trainer.epochs)
        self.order = [shuffled(position, len(pairs), trainer.seed) for position in positions]
        tokens = np.array([pairs.num_tokens(index) for index in self.order])
        self.tokens_through = np.concatenate([[0], tokens.cumsum()])

    def __len__(self) -> int:
        return -(-len(self.order) // self.trainer.batch_rows)

    def tokens_before(self, step: int) -> int:
        return int(self.tokens_through[min(step * self.trainer.batch_rows, len(self.order))])

    def __getitem__(self, step: int) -> StepBatch:
        first = step * self.trainer.batch_rows
        indices = self.order[first : first + self.trainer.batch_rows]
        packed = packed_pairs if self.trainer.loss != "kto" else packed_votes
        return StepBatch(
            packed(self.pairs, indices, self.infra, self.reference),
            num_units=len(indices),
            num_tokens=self.tokens_before(step + 1) - self.tokens_before(step),
            num_chosen_tokens=sum(len(self.pairs[index].chosen_ids) for index in indices),
        )


def packed_documents(shards: TokenShards, capacity: int) -> list[list[tuple[int, int]]]:
    """The rows of `packing=documents`: where each document, or piece of one, starts and stops in the stream.

    The rows hold at most `capacity` tokens of input: the last token of a piece is only predicted, and the next piece of
    its document begins with it, so that each token of a document but the first is a target once.
    """
    starts, stops = pieces(shards.offsets, capacity).T
    stops = stops + ~np.isin(stops, shards.offsets)
    inputs = stops - starts - 1
    kept = np.flatnonzero(inputs)  # nothing is left to predict of a piece of one token
    rows = best_fit(inputs[kept], capacity)
    return [[(int(starts[kept[piece]]), int(stops[kept[piece]])) for piece in row] for row in rows]


def packed_rows(rows: Sequence[Sequence[Tree]], indices: Sequence[int], infra: Infra) -> list[MicroBatch]:
    """Rows of documents in micro-batches."""
    sizes = [sum(tree.num_tokens for tree in row) for row in rows]
    nothing = torch.zeros(0)
    return [
        MicroBatch(
            pack((tree for place in places for tree in rows[place]), **padding(infra)),
            indices=torch.tensor([indices[place] for place in places], dtype=torch.int64),
            reference=nothing,
            is_desirable=nothing.bool(),
        )
        for places in balanced(sizes, infra.micro_batch_tokens, infra.ranks)
    ]


def packed_pairs(
    pairs: PreferencePairs, indices: Sequence[int], infra: Infra, reference: AnswerLogProbs | None
) -> list[MicroBatch]:
    """The pairs of `indices` in micro-batches, each prompt shared by its two answers."""
    members = [pairs[index] for index in indices]
    trees = [pair(member.prompt_ids, member.chosen_ids, member.rejected_ids) for member in members]
    found = []
    for places in balanced([tree.num_tokens for tree in trees], infra.micro_batch_tokens, infra.ranks):
        here = [indices[place] for place in places]
        known = torch.zeros(2 * len(here))
        if reference is not None:
            known = torch.stack([reference.chosen[here], reference.rejected[here]], dim=1).flatten()
        found.append(
            MicroBatch(
                pack((trees[place] for place in places), **padding(infra)),
                indices=torch.tensor(here, dtype=torch.int64),
                reference=known,
                is_desirable=torch.zeros(0, dtype=torch.bool),
            )
        )
    return found


def packed_votes(
    votes: PreferencePairs, indices: Sequence[int], infra: Infra, reference: AnswerLogProbs | None
) -> list[MicroBatch]:
    """The votes of `indices` in micro-batches; the second answer of each is one to another prompt."""
    assert reference is not None, "KTO has a reference"
    members = [votes[index] for index in indices]
    answers = [pair(member.prompt_ids, member.chosen_ids) for member in members]
    mismatched = [pair(member.prompt_ids, member.rejected_ids) for member in members]
    sizes = [max(one.num_tokens, other.num_tokens) for one, other in zip(answers, mismatched, strict=True)]
    found = []
    for places in balanced(sizes, infra.micro_batch_tokens, infra.ranks):
        here = [indices[place] for place in places]
        found.append(
            MicroBatch(
                pack((answers[place] for place in places), **padding(infra)),
                indices=torch.tensor(here, dtype=torch.int64),
                reference=reference.chosen[here],
                is_desirable=torch.tensor([votes.is_desirable(index) for index in here], dtype=torch.bool),
                mismatched=pack((mismatched[place] for place in places), **padding(infra)),
                mismatched_reference=reference.rejected[here],
            )
        )
    return found


def balanced(sizes: Sequence[int], limit: int, ranks: int) -> list[list[int]]:
    """Items of these sizes in groups of at most `limit` together, or one item; their number is a multiple of `ranks`.

    The fewest groups that come out at most `limit` when each item, from the largest to the smallest, joins the smallest
    group (Graham, 1969: at most 4/3 of the best largest group). Groups may be empty; a group's items keep their order.
    """
    order = sorted(range(len(sizes)), key=lambda item: -sizes[item])
    limit = max([limit, *sizes])
    number = ranks * max(1, -(-sum(sizes) // (limit * ranks)))
    while True:
        groups: list[list[int]] = [[] for _ in range(number)]
        totals = [(0, group) for group in range(number)]  # a heap: the smallest first
        for item in order:
            total, smallest = totals[0]
            groups[smallest].append(item)
            heapreplace(totals, (total + sizes[item], smallest))
        if max(totals)[0] <= limit:
            return [sorted(group) for group in groups]
        number += ranks


def padding(infra: Infra) -> dict[str, int]:
    """What `pack` fills rows up to: compiled kernels want one shape, oneDNN's (bf16 on a CPU) few, as each is made anew
    and kept."""
    if infra.compile:
        return {"pad_to": -(-infra.micro_batch_tokens // 128) * 128}
    return {"multiple_of": SAME_SHAPE} if infra.accelerator == "cpu" and infra.precision == "bf16" else {}


def steps_from(steps: Steps, first_step: int) -> DataLoader[StepBatch]:
    """A loader that begins at `first_step`.

    It has a generator of its own: creating a loader's iterator otherwise draws from the global one, and a resumed run
    would differ from an uninterrupted one.
    """
    return DataLoader(
        cast(Dataset[StepBatch], steps),
        batch_size=None,
        sampler=range(first_step, len(steps)),
        generator=torch.Generator().manual_seed(0),
    )
