"""Global batches by step: any step is reached in O(1), and its content depends on seed and data alone.

One item of a `Steps` data set is one optimizer step, split into micro-batches that fit `infra.micro_batch_tokens`.
Batches are not frozen: Lightning moves them to the device by setting their fields.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from llmtrain.config.trainer import DPOTrainer, PretrainTrainer
from llmtrain.data.order import shuffled
from llmtrain.data.preferences import Pair, PreferencePairs
from llmtrain.data.text import TokenShards


@dataclass
class TextRows:
    """Rows of text; each token but the first of a row is a target."""

    ids: Tensor
    """[rows, time + 1] int64"""


@dataclass(frozen=True)
class AnswerLogProbs:
    """ln p(answer | prompt), summed over the answer's tokens, for the pairs of one split in the split's order."""

    chosen: Tensor
    """[pairs] fp32, fp64 of an fp64 model"""
    rejected: Tensor
    """[pairs], as `chosen`"""


@dataclass
class PairRows:
    """n pairs as 2n rows, padded on the right: the chosen answers, then the rejected ones, in the same order."""

    ids: Tensor
    """[2n, time] int64"""
    is_answer: Tensor
    """[2n, time - 1] bool: does the token after this position belong to the answer"""
    reference: Tensor
    """[2n]: log-probability of each answer under the reference; zeros where it is not known yet"""


@dataclass
class StepBatch:
    """What one optimizer step trains on."""

    micro_batches: list[TextRows] | list[PairRows]
    num_units: int
    """What the loss is normalised by: target tokens (pretraining) or pairs (DPO)."""
    num_tokens: int
    """What the clock advances by."""


class TextSteps(Dataset[StepBatch]):
    """Pretraining: rows of `sequence_tokens`, reshuffled each time the corpus is through."""

    def __init__(self, shards: TokenShards, trainer: PretrainTrainer, micro_batch_tokens: int) -> None:
        self.shards, self.trainer = shards, trainer
        self.rows_at_once = max(1, micro_batch_tokens // trainer.sequence_tokens)
        self.num_rows = shards.num_rows(trainer.sequence_tokens)
        self.step_tokens = trainer.batch_rows * trainer.sequence_tokens

    def __len__(self) -> int:
        return self.trainer.budget_tokens // self.step_tokens

    def tokens_before(self, step: int) -> int:
        return step * self.step_tokens

    def __getitem__(self, step: int) -> StepBatch:
        first = step * self.trainer.batch_rows
        indices = [shuffled(p, self.num_rows, self.trainer.seed) for p in range(first, first + self.trainer.batch_rows)]
        rows = np.stack([self.shards.row(index, self.trainer.sequence_tokens) for index in indices])
        micro_batches = [TextRows(ids) for ids in torch.split(torch.from_numpy(rows), self.rows_at_once)]
        return StepBatch(micro_batches, num_units=self.step_tokens, num_tokens=self.step_tokens)


class PairSteps(Dataset[StepBatch]):
    """DPO: `batch_rows` pairs a step over `epochs` passes; the last step may be smaller."""

    def __init__(
        self, pairs: PreferencePairs, reference: AnswerLogProbs, trainer: DPOTrainer, micro_batch_tokens: int
    ) -> None:
        self.pairs, self.reference, self.trainer = pairs, reference, trainer
        self.micro_batch_tokens = micro_batch_tokens
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
        return StepBatch(
            list(pair_rows(self.pairs, indices, self.micro_batch_tokens, self.reference)),
            num_units=len(indices),
            num_tokens=self.tokens_before(step + 1) - self.tokens_before(step),
        )


def pair_rows(
    pairs: PreferencePairs, indices: list[int], micro_batch_tokens: int, reference: AnswerLogProbs | None
) -> Iterator[PairRows]:
    """The pairs of `indices`, longest first (so that little is padding), cut into micro-batches.

    Padding included, a micro-batch has at most `micro_batch_tokens`, or one pair. `longest_first` tells the order.
    """
    at_once: list[int] = []
    for index in longest_first(pairs, indices):
        longest = _length(pairs[at_once[0]] if at_once else pairs[index])
        if at_once and 2 * longest * (len(at_once) + 1) > micro_batch_tokens:
            yield _pad(pairs, at_once, reference)
            at_once = []
        at_once.append(index)
    if at_once:
        yield _pad(pairs, at_once, reference)


def longest_first(pairs: PreferencePairs, indices: list[int]) -> list[int]:
    """`indices` by falling length, equal lengths by index."""
    return sorted(indices, key=lambda index: (-_length(pairs[index]), index))


def steps_from(steps: TextSteps | PairSteps, first_step: int) -> DataLoader[StepBatch]:
    """A loader that begins at `first_step`.

    It has a generator of its own: creating a loader's iterator otherwise draws from the global one, and a resumed run
    would differ from an uninterrupted one.
    """
    return DataLoader(
        steps,
        batch_size=None,
        sampler=range(first_step, len(steps)),
        generator=torch.Generator().manual_seed(0),
    )


def _length(pair: Pair) -> int:
    return len(pair.prompt_ids) + max(len(pair.chosen_ids), len(pair.rejected_ids))


def _pad(pairs: PreferencePairs, indices: list[int], reference: AnswerLogProbs | None) -> PairRows:
    members = [pairs[index] for index in indices]
    answers = [(pair.prompt_ids, pair.chosen_ids) for pair in members]
    answers += [(pair.prompt_ids, pair.rejected_ids) for pair in members]
    ids = torch.zeros(len(answers), max(len(prompt) + len(answer) for prompt, answer in answers), dtype=torch.int64)
    is_answer = torch.zeros(len(answers), ids.shape[1] - 1, dtype=torch.bool)
    for row, (prompt, answer) in enumerate(answers):
        end = len(prompt) + len(answer)
        ids[row, :end] = torch.from_numpy(np.concatenate([prompt, answer]).astype(np.int64))
        is_answer[row, max(len(prompt), 1) - 1 : end - 1] = True  # nothing predicts the first token of all
    known = (
        torch.zeros(len(answers))
        if reference is None
        else torch.cat([reference.chosen[indices], reference.rejected[indices]])
    )
    return PairRows(ids, is_answer, known)
