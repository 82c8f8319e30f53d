"""How transformers' layers keep keys and values in `Slots`, and attend to them where they lie."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import Cache

from llmtrain.errors import UnsupportedModel
from llmtrain.serving.slots import Slots


@dataclass(frozen=True)
class Segment:
    """Consecutive tokens of one sequence, among those of others, end to end in one row that is fed."""

    row: int
    """Of the slots' arrays."""
    offset: int
    """Place of its first token in the row that is fed."""
    size: int
    start: int
    """Tokens that the sequence had before."""
    device: torch.device

    @property
    def stop(self) -> int:
        return self.start + self.size

    @property
    def place(self) -> slice:
        return slice(self.offset, self.offset + self.size)

    @cached_property
    def positions(self) -> Tensor:
        return torch.arange(self.start, self.stop, device=self.device)

    @cached_property
    def mask(self) -> Tensor | None:
        """[size, stop]: may a token see another; None where SDPA's own causal mask is the one, or all are seen."""
        if self.start == 0 or self.size == 1:
            return None
        return torch.arange(self.stop, device=self.device) <= self.positions[:, None]


class SlotCache(Cache):
    """What transformers' layers write keys and values to, and read them from."""

    def __init__(self, slots: Slots) -> None:
        super().__init__(layers=[])
        self._slots = slots
        self._segments: Sequence[Segment] = ()

    def at_segments(self, segments: Sequence[Segment]) -> None:
        """Next come these."""
        self._segments = segments

    def at_front(self, lengths: Tensor, longest: int, *, equal: bool) -> None:
        """Next comes one token of each of the first rows, behind the `lengths` that they have, `longest` with it.

        Where these are `equal`, a slice is written, which takes a tenth of the time.
        """
        rows = slice(len(lengths))
        self._segments = ()
        self._written: Any = (rows, slice(None), longest - 1)
        if not equal:
            self._written = (torch.arange(len(lengths), device=lengths.device), slice(None), lengths)
        self._read = (rows, slice(None), slice(longest))

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Keep [rows, key heads, tokens, width]. Gives the rows that are stepped, up to the longest; to segments all
        rows, among which they know theirs."""
        arrays = self._slots.arrays[2 * layer_idx : 2 * layer_idx + 2]
        for array, states in zip(arrays, (key_states, value_states), strict=True):
            for segment in self._segments:
                array[segment.row, :, segment.start : segment.stop] = states[0, :, segment.place]
            if not self._segments:
                array[self._written] = states[:, :, 0]
        keys, values = arrays if self._segments else [array[self._read] for array in arrays]
        return keys, values

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0  # positions are always given


def slot_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    segments: Sequence[Segment] = (),
    **others: Any,
) -> tuple[Tensor, None]:
    """SDPA as transformers calls it: query [rows, heads, tokens, width], key and value [rows, key heads, seen, width]
    -> [rows, tokens, heads, width].

    With `segments`, query is one row that holds them end to end; each sees its own row of key and value. Raises
    UnsupportedModel for what only some architectures ask for (sliding windows, sinks, soft caps).
    """
    if unknown := [name for name in ("sliding_window", "s_aux", "softcap") if others.get(name) is not None]:
        raise UnsupportedModel(
            f"{type(module).__name__} asks for {', '.join(unknown)}, which this runtime has not: serve with vLLM"
        )
    if not segments:
        return _attend(query, key, value, attention_mask, scaling), None
    found = [
        _attend(query[:, :, one.place], key[one.row, None, :, : one.stop], value[one.row, None, :, : one.stop],
                one.mask, scaling)
        for one in segments
    ]  # fmt: skip
    return torch.cat(found, dim=1), None


def _attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float | None) -> Tensor:
    """Without a mask, tokens see those before them: there are as many keys as queries, or there is one query.

    Heads that share keys read them where they lie: nothing is repeated.
    """
    rows, heads, tokens, width = query.shape
    if tokens == 1:  # heads that share keys are like so many queries of one head
        grouped = query.reshape(rows, key.shape[1], -1, width)
        return scaled_dot_product_attention(grouped, key, value, mask, scale=scale).reshape(rows, 1, heads, width)
    causal, shared = mask is None, heads > key.shape[1]
    found = scaled_dot_product_attention(query, key, value, mask, is_causal=causal, scale=scale, enable_gqa=shared)
    return found.transpose(1, 2)


def zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros whose pages cost no memory on a CPU before they are written; torch.zeros would write them all."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    return torch.from_numpy(np.zeros(math.prod(shape) * dtype.itemsize, np.uint8)).view(dtype).view(shape)
