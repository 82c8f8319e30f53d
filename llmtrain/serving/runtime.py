"""The four verbs that a model is driven by: load, feed, step, drop. PyTorch and ONNX Runtime stand behind them."""

from collections.abc import Sequence
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

Logits = NDArray[np.float32]
Want = Literal["none", "last", "all"]
"""Of which of the fed tokens logits are given."""


class Runtime(Protocol):
    """A model that keeps the keys and values of several sequences, each in a slot, 0 to `max_sequences` - 1.

    The verb `load` is each runtime's own function: `load(directory, ...) -> Runtime`. One thread calls the others.
    Logits may be written over by the next call: use or copy them before it. A call that raises leaves all sequences as
    they were.
    """

    vocab_size: int
    """Columns of the logits; the tokenizer may have fewer tokens."""
    context_tokens: int
    """Most tokens of one sequence."""
    max_sequences: int

    def feed(self, slot: int, ids: Sequence[int], want: Want) -> Logits:
        """Append `ids` (one or more) to the sequence in `slot`, which is empty after `drop` and at the start.

        Returns fp32 logits: of every fed token [len(ids), vocab_size], of the last [1, vocab_size], or none
        [0, vocab_size]. Raises ValueError where the sequence would become longer than `context_tokens`.
        """
        ...

    def feed_each(self, parts: Sequence[tuple[int, Sequence[int], Want]]) -> list[Logits]:
        """`feed` for several different sequences, which may cost less than one after the other."""
        ...

    def step(self, slots: Sequence[int], ids: Sequence[int]) -> Logits:
        """Append one token to each of several different sequences; fp32 logits [len(slots), vocab_size]."""
        ...

    def drop(self, slot: int) -> None:
        """Forget the sequence in `slot`."""
        ...
