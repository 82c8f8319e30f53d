"""Causal attention within packed rows on a CPU, in full precision: blocks of queries against the keys that they see.

PyTorch's SDPA reaches half of a matrix product's speed here, repeats grouped keys for every query head and wants each
segment cut out of its row. Below, a block's queries of all heads of a group stand under each other in one product, what
the causal mask hides is skipped block by block, and results are written to their place in the row. The backward pass
computes the probabilities again (as FlashAttention does, arXiv 2205.14135): only queries, keys and values are kept.

Operators of their own, so that a plan, a FLOP counter and activation checkpointing see one call where there is one.
`segments` are four numbers each: start, stop, context start, context stop, as in `llmtrain.models.packed`.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

BLOCK = 128
"""Queries at a time: 64 and 256 took as long or up to a quarter longer (heads of 32 to 128, rows of 32 to 1,024)."""


def numbers_of(segments: Tensor) -> list[int]:
    """[segments, 4] as the operators take them."""
    return [int(number) for segment in segments.tolist() for number in segment]


@torch.library.custom_op("llmtrain::block_attention", mutates_args=())
def block_attention(query: Tensor, key: Tensor, value: Tensor, segments: list[int], scale: float) -> Tensor:
    """query [1, heads, tokens, width], key and value [1, key heads, tokens, width] -> [1, tokens, heads, width]."""
    grouped, keys, values = _grouped(query, key), key[0], value[0]
    groups, per_group, tokens, width = grouped.shape
    out = query.new_empty(tokens, groups, per_group, width)
    memory = _Memory(grouped, segments)
    for segment in each_segment(segments):
        seen_keys, seen_values = _seen(keys, segment), _seen(values, segment)
        for start, stop, visible in _blocks(segment):
            queries = grouped[:, :, start:stop].reshape(groups, -1, width) * scale
            probabilities = memory.probabilities(queries, seen_keys[:, :visible], stop - start)
            found = torch.bmm(probabilities, seen_values[:, :visible])
            out[start:stop] = found.view(groups, per_group, -1, width).permute(2, 0, 1, 3)
    return out.view(1, tokens, -1, width)


@torch.library.custom_op("llmtrain::block_attention_backward", mutates_args=())
def block_attention_backward(
    upstream: Tensor, query: Tensor, key: Tensor, value: Tensor, segments: list[int], scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value, in their shapes; upstream [1, tokens, heads, width]."""
    grouped, keys, values = _grouped(query, key), key[0], value[0]
    groups, per_group, tokens, width = grouped.shape
    upstream = upstream.reshape(tokens, groups, per_group, width).permute(1, 2, 0, 3)
    of_query = torch.empty_like(grouped, memory_format=torch.contiguous_format)
    of_key, of_value = (key.new_zeros(groups, tokens, width) for _ in range(2))
    memory, of_scores = _Memory(grouped, segments), _Memory(grouped, segments)
    for segment in each_segment(segments):
        seen_keys, seen_values = _seen(keys, segment), _seen(values, segment)
        of_seen_keys, of_seen_values = _sum_of_seen(of_key, segment), _sum_of_seen(of_value, segment)
        for start, stop, visible in _blocks(segment):
            queries = grouped[:, :, start:stop].reshape(groups, -1, width) * scale
            of_found = upstream[:, :, start:stop].reshape(groups, -1, width)
            probabilities = memory.probabilities(queries, seen_keys[:, :visible], stop - start)
            of_seen_values[:, :visible] += torch.bmm(probabilities.transpose(1, 2), of_found)
            found = of_scores.product(of_found, seen_values[:, :visible])
            torch._softmax_backward_data(found, probabilities, -1, query.dtype, grad_input=found)
            of_queries = torch.bmm(found, seen_keys[:, :visible]).mul_(scale)
            of_query[:, :, start:stop] = of_queries.view(groups, per_group, -1, width)
            of_seen_keys[:, :visible] += torch.bmm(found.transpose(1, 2), queries)
        _add_to_row(of_key, of_seen_keys, segment)
        _add_to_row(of_value, of_seen_values, segment)
    return of_query.view(query.shape), of_key[None], of_value[None]


Segment = tuple[int, int, int, int]


def each_segment(segments: Sequence[int]) -> Iterator[Segment]:
    """The four numbers of each."""
    numbers = iter(segments)
    return zip(numbers, numbers, numbers, numbers, strict=True)


def _blocks(segment: Segment) -> Iterator[tuple[int, int, int]]:
    """(first query, behind the last one, keys that the last one sees, the context's included)."""
    start, stop, context_start, context_stop = segment
    for first in range(start, stop, BLOCK):
        behind = min(first + BLOCK, stop)
        yield first, behind, context_stop - context_start + behind - start


def _grouped(query: Tensor, key: Tensor) -> Tensor:
    """[key heads, query heads of each, tokens, width]"""
    return query.view(key.shape[1], -1, *query.shape[2:])


def _seen(row: Tensor, segment: Segment) -> Tensor:
    """[key heads, context and own tokens, width]; a view where there is no context."""
    start, stop, context_start, context_stop = segment
    own = row[:, start:stop]
    return torch.cat([row[:, context_start:context_stop], own], dim=1) if context_stop > context_start else own


def _sum_of_seen(row: Tensor, segment: Segment) -> Tensor:
    """Where the gradient of `_seen(row, segment)` is summed: in `row` itself where there is no context."""
    start, stop, context_start, context_stop = segment
    context = context_stop - context_start
    return row.new_zeros(len(row), context + stop - start, row.shape[2]) if context else row[:, start:stop]


def _add_to_row(row: Tensor, found: Tensor, segment: Segment) -> None:
    start, stop, context_start, context_stop = segment
    if context := context_stop - context_start:
        row[:, context_start:context_stop] += found[:, :context]
        row[:, start:stop] += found[:, context:]


class _Memory:
    """Room for one block's scores, used again by the next one."""

    def __init__(self, grouped: Tensor, segments: Sequence[int]) -> None:
        groups, per_group = grouped.shape[:2]
        rows = groups * per_group
        largest = max((stop - start) * seen for s in each_segment(segments) for start, stop, seen in _blocks(s))
        self.memory = grouped.new_empty(rows * largest)
        hidden = torch.full((BLOCK, BLOCK), -torch.inf, dtype=grouped.dtype)
        self.causal = hidden.triu(1)

    def product(self, left: Tensor, right: Tensor) -> Tensor:
        """left [groups, rows, width] @ right [groups, keys, width].T -> [groups, rows, keys]"""
        size = (len(left), left.shape[1], right.shape[1])
        room = self.memory[: size[0] * size[1] * size[2]].view(size)
        return torch.bmm(left, right.transpose(1, 2), out=room)

    def probabilities(self, queries: Tensor, keys: Tensor, block: int) -> Tensor:
        """[groups, rows, keys]: of the last `block` keys, the n-th query of each head sees the first n."""
        scores = self.product(queries, keys)
        own = scores.view(len(queries), -1, block, keys.shape[1])[..., -block:]
        own += self.causal[:block, :block]
        return torch.softmax(scores, dim=-1, out=scores)


@block_attention.register_fake
def _like_query(query: Tensor, key: Tensor, value: Tensor, segments: Any, scale: float) -> Tensor:
    return query.new_empty(1, query.shape[2], query.shape[1], query.shape[3])


@block_attention_backward.register_fake
def _like_all(
    upstream: Tensor, query: Tensor, key: Tensor, value: Tensor, segments: Any, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(torch.empty_like(t, memory_format=torch.contiguous_format) for t in (query, key, value))  # type: ignore[return-value]


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.segments, ctx.scale = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, upstream: Tensor) -> tuple[Any, ...]:
    return (*block_attention_backward(upstream, *ctx.saved_tensors, ctx.segments, ctx.scale), None, None)


block_attention.register_autograd(_backward, setup_context=_keep)
block_attention.register_autocast("cpu", torch.float32)


@torch.library.custom_op("llmtrain::compiled_block_attention", mutates_args=())
def compiled_block_attention(query: Tensor, key: Tensor, value: Tensor, segments: Tensor, scale: float) -> Tensor:
    """The same with segments [segments, 4]: torch.compile compiles anew for a list of other numbers."""
    return block_attention(query, key, value, numbers_of(segments), scale)  # type: ignore[no-any-return]


@torch.library.custom_op("llmtrain::compiled_block_attention_backward", mutates_args=())
def compiled_block_attention_backward(
    upstream: Tensor, query: Tensor, key: Tensor, value: Tensor, segments: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Its gradients."""
    return block_attention_backward(upstream, query, key, value, numbers_of(segments), scale)  # type: ignore[no-any-return]


compiled_block_attention.register_fake(_like_query)
compiled_block_attention_backward.register_fake(_like_all)


def _keep_compiled(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.scale = inputs
    ctx.save_for_backward(*tensors)


def _backward_compiled(ctx: Any, upstream: Tensor) -> tuple[Any, ...]:
    return (*compiled_block_attention_backward(upstream, *ctx.saved_tensors, ctx.scale), None, None)


compiled_block_attention.register_autograd(_backward_compiled, setup_context=_keep_compiled)
compiled_block_attention.register_autocast("cpu", torch.float32)


def _flops(products: int) -> Callable[..., int]:
    """Counts as SDPA's are counted: every pair of tokens of a segment, hidden or not."""

    def count(*args: Any, out_val: Any = None, **kwargs: Any) -> int:
        *_, query, _, _, segments, _ = args
        pairs = sum(
            (stop - start) * (stop - start + above - below) for start, stop, below, above in each_segment(segments)
        )
        return 2 * products * int(query[1]) * int(query[3]) * pairs

    return count


register_flop_formula(torch.ops.llmtrain.block_attention)(_flops(2))
register_flop_formula(torch.ops.llmtrain.block_attention_backward)(_flops(5))
