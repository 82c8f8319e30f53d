"""Keys and values of sequences of different lengths: one rectangle for all of them, a row for each, in every layer.

Sequences that are stepped together stand in the first rows, so a step reads the rectangle where it lies. A row is moved
only when the set of those sequences changes. PyTorch's and ONNX Runtime's caches both are this one.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

FEWEST_TOKENS = 64
"""Capacity of the first rectangle; it doubles when a sequence outgrows it."""

Array = Any
"""A numpy array or a torch tensor [rows, key heads, capacity, width]. What lies beyond a sequence is read with weight
0, and 0 times a NaN would not be 0: so it is 0 at first, and what a dropped sequence leaves is set to 0."""


class Slots:
    """`arrays` are made by `allocate(rows, capacity)`, which gives one array of zeros, `num_arrays` times.

    Memory grows with the number of sequences and with the longest one, and is given back when the last one is dropped.
    """

    def __init__(
        self, allocate: Callable[[int, int], Array], num_arrays: int, *, max_sequences: int, context_tokens: int
    ) -> None:
        self._allocate, self._num_arrays = allocate, num_arrays
        self.max_sequences, self.context_tokens = max_sequences, context_tokens
        self.arrays: list[Array] = []
        self.lengths: NDArray[np.int64] = np.zeros(max_sequences, np.int64)
        """Tokens of the sequence in each row."""
        self.generation = 0
        """Raised when `arrays` are others than before."""
        self._rows: dict[int, int] = {}
        self._num_rows = self._capacity = 0

    def row(self, slot: int, num_tokens: int) -> int:
        """The row of the sequence in `slot`, with room for so many tokens more.

        Raises ValueError where it would become longer than `context_tokens`.
        """
        row = self._claim(slot)
        self._make_room(row, int(self.lengths[row]) + num_tokens)
        return row

    def front(self, slots: Sequence[int]) -> NDArray[np.int64]:
        """Bring the sequences of `slots` to the first rows, with room for one token more each; the row of each.

        Raises ValueError as `row` does.
        """
        rows = [self._claim(slot) for slot in slots]
        taken = set(rows)
        if len(taken) < len(slots):
            raise ValueError(f"a step has one token for each sequence, not several: slots {list(slots)}")
        self._make_room(max(rows), int(self.lengths[rows].max()) + 1)
        holes = (row for row in range(len(slots)) if row not in taken)
        for row in sorted(row for row in rows if row >= len(slots)):
            self._exchange(row, next(holes))
        return np.array([self._rows[slot] for slot in slots])

    def drop(self, slot: int) -> None:
        """Forget the sequence in `slot`, if there is one."""
        row = self._rows.pop(slot, None)
        if row is None:
            return
        if not self._rows:
            self.arrays, self._num_rows, self._capacity = [], 0, 0
            self.generation += 1
        if length := int(self.lengths[row]):
            for array in self.arrays:
                array[row, :, :length] = 0
        self.lengths[row] = 0

    def _claim(self, slot: int) -> int:
        if not 0 <= slot < self.max_sequences:
            raise ValueError(f"slot {slot} is none of 0 to {self.max_sequences - 1}")
        if slot not in self._rows:
            self._rows[slot] = min(set(range(self.max_sequences)) - set(self._rows.values()))
        return self._rows[slot]

    def _exchange(self, one: int, other: int) -> None:
        longest = int(max(self.lengths[one], self.lengths[other]))
        for array in self.arrays:
            array[[other, one], :, :longest] = array[[one, other], :, :longest]  # indices by a list make a copy
        self.lengths[[one, other]] = self.lengths[[other, one]]
        places = {one: other, other: one}
        self._rows = {slot: places.get(row, row) for slot, row in self._rows.items()}

    def _make_room(self, row: int, num_tokens: int) -> None:
        """Raises ValueError where `num_tokens` are more than the context has."""
        if num_tokens > self.context_tokens:
            raise ValueError(f"{num_tokens} tokens in a sequence, of which the context has {self.context_tokens}")
        if row < self._num_rows and num_tokens <= self._capacity:
            return
        num_rows = max(self._num_rows, min(self.max_sequences, 1 << row.bit_length()))
        needed = max(FEWEST_TOKENS, 1 << (num_tokens - 1).bit_length())
        capacity = max(self._capacity, min(self.context_tokens, needed))
        self.generation += 1
        if not self.arrays:
            self.arrays = [self._allocate(num_rows, capacity) for _ in range(self._num_arrays)]
        else:
            for place, array in enumerate(self.arrays):  # one after the other: only one of them is there twice
                grown = self._allocate(num_rows, capacity)
                for kept in self._rows.values():
                    if length := int(self.lengths[kept]):
                        grown[kept, :, :length] = array[kept, :, :length]
                self.arrays[place] = grown
        self._num_rows, self._capacity = num_rows, capacity
