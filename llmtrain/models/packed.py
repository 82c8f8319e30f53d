"""Packed rows: sequences one after the other in one row of tokens, without padding, each seeing only itself.

A row is cut into segments. The tokens of a segment see each other causally, and all of the segment's context, which is
an earlier range of the row. A document is a segment without context. A preference pair is two segments: prompt and
chosen answer together, then the rejected answer, whose context is the prompt; the prompt is computed once. The last
token of a sequence predicts nothing and is left out. Two pairs in a row, the answers' tokens being targets:

    ids        p p p c | r r | p p | r r        (answers of 2 and 3, then of 1 and 3 tokens)
    positions  0 1 2 3 | 3 4 | 0 1 | 2 3
    segments   (0, 4, 0, 0) (4, 6, 0, 3) (6, 8, 6, 6) (8, 10, 6, 8)
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Array = npt.NDArray[np.int64]


@dataclass
class Packed:
    """One row. Not frozen: Lightning moves it to the device by setting its fields."""

    ids: Tensor
    """[tokens] int64"""
    positions: Tensor
    """[tokens] int64: place in its own sequence"""
    segments: Tensor
    """[segments, 4] int64: start, stop, context start, context stop; they cover the row in order"""
    predictors: Tensor
    """[targets] int64: the places in the row whose hidden states predict the targets"""
    targets: Tensor
    """[targets] int64: the token that is to be predicted"""
    owners: Tensor
    """[targets] int64, rising: the number, in this row, of the sequence or answer that the target belongs to"""
    counts: list[int]
    """Targets of each owner: on the host, so that nobody waits for a device to tell"""

    @property
    def num_owners(self) -> int:
        return len(self.counts)

    @property
    def num_tokens(self) -> int:
        return len(self.ids)

    def to(self, device: torch.device | str) -> "Packed":
        """The same row on another device."""
        tensors = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "counts"}
        return Packed(**{name: tensor.to(device) for name, tensor in tensors.items()}, counts=self.counts)


@dataclass(frozen=True)
class Answer:
    """What follows a prompt, and which of its tokens are targets."""

    ids: Array
    is_target: npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Tree:
    """A prompt with the answers that share it; a document is one answer to a prompt of no tokens.

    The first token of all has no predecessor and is never a target.
    """

    prompt: Array
    answers: Sequence[Answer]

    @property
    def num_tokens(self) -> int:
        """Tokens that it takes in a row."""
        return len(self.prompt) + sum(len(answer.ids) - 1 for answer in self.answers)


def document(ids: Array, is_target: npt.NDArray[np.bool_] | None = None) -> Tree:
    """A sequence that stands alone; by default each token but the first is a target."""
    return Tree(ids[:0], [Answer(ids, np.ones(len(ids), dtype=bool) if is_target is None else is_target)])


def pair(prompt: Array, *answers: Array) -> Tree:
    """A prompt and its answers, each token of which is a target."""
    return Tree(prompt, [Answer(ids, np.ones(len(ids), dtype=bool)) for ids in answers])


def pack(trees: Iterable[Tree], pad_to: int = 1, multiple_of: int = 1) -> Packed:
    """`trees` in one row; a segment of its own fills it up to `pad_to` tokens, and to a multiple of `multiple_of`."""
    ids: list[Array] = []
    positions: list[Array] = []
    segments: list[tuple[int, int, int, int]] = []
    predictors: list[Array] = []
    targets: list[Array] = []
    owners: list[Array] = []
    counts: list[int] = []
    length = 0

    def append(part: Array, first_position: int) -> None:
        nonlocal length
        ids.append(part)
        positions.append(np.arange(first_position, first_position + len(part)))
        length += len(part)

    for tree in trees:
        root, shared = length, len(tree.prompt)
        append(tree.prompt, 0)
        for number, answer in enumerate(tree.answers):
            start = length
            append(answer.ids[:-1], shared)
            segments.append((start, length, root, root + shared) if number else (root, length, root, root))
            before = np.arange(start - 1, start - 1 + len(answer.ids))
            before[:1] = root + shared - 1  # the prompt's last token predicts the first of each answer
            is_target = answer.is_target & (before >= root)
            predictors.append(before[is_target])
            targets.append(answer.ids[is_target])
            owners.append(np.full(int(is_target.sum()), len(counts)))
            counts.append(len(owners[-1]))
    whole = -(-max(length, pad_to) // multiple_of) * multiple_of
    if length < whole:
        segments.append((length, whole, length, length))
        append(np.zeros(whole - length, dtype=np.int64), 0)
    segments = [segment for segment in segments if segment[0] < segment[1]]
    return Packed(
        ids=_tensor(ids),
        positions=_tensor(positions),
        segments=torch.tensor(segments, dtype=torch.int64).reshape(-1, 4),
        predictors=_tensor(predictors),
        targets=_tensor(targets),
        owners=_tensor(owners),
        counts=counts,
    )


def _tensor(parts: list[Array]) -> Tensor:
    return torch.from_numpy(np.concatenate([np.zeros(0, dtype=np.int64), *parts]).astype(np.int64, copy=False))
