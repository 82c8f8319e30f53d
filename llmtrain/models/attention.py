"""Attention within packed rows, under kernels that compute the same.

`segments` runs each segment alone, without work for what is masked: by products of our own (`block_attention`) in full
precision on a CPU, by SDPA (equal shapes together) elsewhere.
`compiled_segments` is the first of the two for a compiled network, which is not compiled anew for other segments.
`sdpa` runs SDPA on the whole row under a dense mask: the plain form, which the others are tested against.
`flex` runs FlexAttention (arXiv 2412.05496) under a block mask: blocks that are masked whole are skipped. CUDA.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from llmtrain.errors import UnsupportedModel
from llmtrain.models.block_attention import (
    block_attention,
    compiled_block_attention,
    each_segment,
    numbers_of,
)
from llmtrain.models.packed import Packed

Kernel = Literal["segments", "compiled_segments", "sdpa", "flex"]
IMPLEMENTATION: dict[Kernel, str] = {
    "segments": "llmtrain_segments",
    "compiled_segments": "llmtrain_compiled_segments",
    "sdpa": "sdpa",
    "flex": "flex_attention",
}
"""The kernels' names in transformers."""


def use(model: PreTrainedModel, kernel: Kernel) -> None:
    """Let `model` run packed rows by `kernel`, until `generating` or another call. Other rows run as ever."""
    model.set_attn_implementation(IMPLEMENTATION[kernel])


def kernel_of(model: PreTrainedModel) -> Kernel:
    """The kernel that `use` chose."""
    name = model.config._attn_implementation
    return next((kernel for kernel, implementation in IMPLEMENTATION.items() if implementation == name), "sdpa")


@contextmanager
def generating(model: PreTrainedModel) -> Iterator[None]:
    """transformers' own SDPA and no compilation, for rows that grow token by token: FlexAttention, and blocks, would be
    compiled for each length. Not around a forward pass whose activations are computed again outside."""
    kernel = kernel_of(model)
    use(model, "sdpa")
    try:
        with torch.compiler.set_stance("force_eager"):
            yield
    finally:
        use(model, kernel)


def mask_arguments(kernel: Kernel, packed: Packed) -> dict[str, Any]:
    """What `model.base_model` needs besides ids and positions, to keep attention within the segments of `packed`."""
    no_mask = packed.ids.new_empty((1, 1, 1, 1))  # transformers makes none where it is given one
    match kernel:
        case "segments":
            return {"segments": numbers_of(packed.segments), "attention_mask": no_mask}
        case "compiled_segments":
            torch._dynamo.maybe_mark_dynamic(packed.segments, 0)  # one compilation for any number of them
            return {"segments": packed.segments, "attention_mask": no_mask}
        case "sdpa":
            return {"attention_mask": dense_mask(packed)[None, None]}
        case "flex":
            return {"attention_mask": block_mask(packed)}


def dense_mask(packed: Packed) -> Tensor:
    """[tokens, tokens] bool: may the token of a row (query) see that of a column (key)?"""
    return _dense_mask(packed.segments, packed.num_tokens)


def _dense_mask(segments: Tensor, num_tokens: int) -> Tensor:
    start, context_start, context_stop = _of_each_token(segments, num_tokens)
    query = torch.arange(num_tokens, device=segments.device)[:, None]
    key = query.T
    own = (key <= query) & (key >= start[:, None])
    return own | ((key >= context_start[:, None]) & (key < context_stop[:, None]))


def block_mask(packed: Packed) -> BlockMask:
    """The same as a block mask of FlexAttention."""
    start, context_start, context_stop = _of_each_token(packed.segments, packed.num_tokens)

    def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        own = (key <= query) & (key >= start[query])
        return own | ((key >= context_start[query]) & (key < context_stop[query]))

    size, device = packed.num_tokens, packed.ids.device
    return create_block_mask(visible, None, None, size, size, device=device, _compile=device.type == "cuda")


def _of_each_token(segments: Tensor, num_tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    """[tokens] each: start, context start and context stop of the token's segment."""
    of_tokens = segments.repeat_interleave(segments[:, 1] - segments[:, 0], dim=0, output_size=num_tokens)
    start, _, context_start, context_stop = of_tokens.unbind(dim=1)
    return start, context_start, context_stop


Shapes = dict[tuple[int, int], list[tuple[int, tuple[int, int, int, int]]]]
"""Segments, with their places in the row's order, by (length, length of the context)."""


def by_shape(segments: Sequence[int]) -> Shapes:
    """Segments, four numbers each, of equal shape together: each group is one call of SDPA."""
    found: Shapes = defaultdict(list)
    for place, segment in enumerate(each_segment(segments)):
        start, stop, context_start, context_stop = segment
        found[stop - start, context_stop - context_start].append((place, segment))
    return dict(found)


def segment_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    segments: Sequence[int] | None = None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Attention within `segments`, as transformers calls it; without segments, transformers' own SDPA.

    query [1, heads, tokens, width], key and value [1, key heads, tokens, width] -> [1, tokens, heads, width]. Raises
    UnsupportedModel for what only some layers of some architectures ask for (sliding windows, sinks, soft caps).
    """
    if segments is None:
        found: tuple[Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **others
        )
        return found
    _refuse_unknown(module, others)
    in_blocks = query.dtype.itemsize >= 4 or torch.is_autocast_enabled("cpu")  # which casts them to fp32
    if query.device.type == "cpu" and in_blocks and not dropout:
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        return block_attention(query, key, value, list(segments), scale), None
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    pieces: dict[int, Tensor] = {}
    for (length, context), members in by_shape(segments).items():
        parts = []
        for _, (start, stop, context_start, context_stop) in members:
            own = slice(start, stop)
            if context:
                seen = [torch.cat([t[:, :, context_start:context_stop], t[:, :, own]], dim=2) for t in (key, value)]
            else:
                seen = [key[:, :, own], value[:, :, own]]
            parts.append((query[:, :, own], *seen))
        q, k, v = parts[0] if len(parts) == 1 else (torch.cat(same) for same in zip(*parts, strict=True))
        mask = (
            torch.ones(length, context + length, dtype=torch.bool, device=q.device).tril(context) if context else None
        )
        attended = scaled_dot_product_attention(
            q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=mask is None, scale=scaling
        ).transpose(1, 2)
        pieces |= {place: piece for (place, _), piece in zip(members, torch.split(attended, 1), strict=True)}
    return torch.cat([pieces[place] for place in range(len(pieces))], dim=1), None


def compiled_segment_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    segments: Tensor | None = None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """The same for fp32 on a CPU, with `segments` [segments, 4], so that torch.compile can take it whole."""
    if segments is None or dropout:  # with dropout under the dense mask: the blocks know none
        mask = attention_mask if segments is None else _dense_mask(segments, query.shape[2])[None, None]
        found: tuple[Tensor, None] = sdpa_attention_forward(
            module, query, key, value, mask, dropout=dropout, scaling=scaling, **others
        )
        return found
    _refuse_unknown(module, others)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return compiled_block_attention(query, key, value, segments, scale), None


def _refuse_unknown(module: nn.Module, others: dict[str, Any]) -> None:
    if unknown := [name for name in ("sliding_window", "s_aux", "softcap") if others.get(name) is not None]:
        raise UnsupportedModel(
            f"attention within documents knows no {', '.join(unknown)}, which {type(module).__name__} asks for; choose "
            f"a model without it"
        )


AttentionInterface.register(IMPLEMENTATION["segments"], segment_attention)
AttentionInterface.register(IMPLEMENTATION["compiled_segments"], compiled_segment_attention)
for name in ("segments", "compiled_segments"):
    AttentionMaskInterface.register(IMPLEMENTATION[name], sdpa_mask)
