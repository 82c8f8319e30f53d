"""PyTorch behind the four verbs: transformers' network, with keys and values kept by us."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, Cache, PreTrainedModel

from llmtrain.errors import UnsupportedModel, UserError
from llmtrain.models import directory as model_directory
from llmtrain.serving.runtime import Logits
from llmtrain.serving.slots import Slots

ATTENTION = "llmtrain_slots"
"""The name of `slot_attention` in transformers."""
MOST_DIFFERENCE: dict[torch.dtype, float] = {torch.float32: 1e-3, torch.bfloat16: 0.25}
"""Largest difference of log-probabilities, in nats, from transformers' own forward pass, on load."""


def load(
    directory: Path,
    *,
    device: Literal["cpu", "cuda"],
    precision: Literal["fp32", "bf16"],
    max_sequences: int,
    context_tokens: int,
    threads: int,
) -> "TorchRuntime":
    """The model of a Hugging Face directory: safetensors only, and no code that lies there is run.

    `threads` is set for this process. Raises CheckpointMismatch where no model loads, UnsupportedModel where it needs
    what this runtime has not (sliding windows, positions that depend on the length) or computes something else here
    than in transformers, and UserError for a device that is missing or a context that the model has not.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("serving on cuda, but PyTorch sees no CUDA device: serve on cpu, or check nvidia-smi")
    torch.set_num_threads(threads)
    model = model_directory.load(directory)
    _check_kind(model, context_tokens)
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    for parameter in model.parameters():  # not the buffers: rotary frequencies stay exact, as transformers keeps them
        parameter.data = parameter.data.to(dtype)
    model = model.to(device).eval()
    expected = _logprobs_of_transformers(model)
    try:
        runtime = TorchRuntime(model, max_sequences=max_sequences, context_tokens=context_tokens)
        found = _own_logprobs(runtime)
    except Exception as error:
        raise UnsupportedModel(
            f"{type(model).__name__} cannot be driven by this runtime ({type(error).__name__}: {error}): serve it with "
            f"vLLM"
        ) from error
    difference = float((found - expected[: len(found)]).abs().max())
    if not difference <= MOST_DIFFERENCE[dtype]:
        raise UnsupportedModel(
            f"{type(model).__name__}: log-probabilities differ by {difference:.3g} from those of transformers' own "
            f"forward pass, of which {MOST_DIFFERENCE[dtype]} is allowed: serve it with vLLM"
        )
    return runtime


class TorchRuntime:
    """See `Runtime`. On CUDA, logits of a step come to pinned memory, which the next call writes again."""

    def __init__(self, model: PreTrainedModel, *, max_sequences: int, context_tokens: int) -> None:
        AttentionInterface.register(ATTENTION, slot_attention)
        model.set_attn_implementation(ATTENTION)
        config = model.config
        self.vocab_size: int = config.vocab_size
        self.context_tokens, self.max_sequences = context_tokens, max_sequences
        self._model, self._device, self._dtype = model, model.device, model.dtype
        heads = config.num_key_value_heads
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads

        def allocate(rows: int, capacity: int) -> Tensor:
            return zeros((rows, heads, capacity, width), self._dtype, self._device)

        self._slots = Slots(
            allocate, 2 * config.num_hidden_layers, max_sequences=max_sequences, context_tokens=context_tokens
        )
        self._cache = _SlotCache(self._slots)
        self._host: Tensor | None = None
        if self._device.type == "cuda":
            self._host = torch.empty((max_sequences, self.vocab_size), dtype=torch.float32, pin_memory=True)

    @torch.inference_mode()
    def feed(self, slot: int, ids: Sequence[int], want: Literal["none", "last", "all"]) -> Logits:
        row = self._slots.row(slot, len(ids))
        start = int(self._slots.lengths[row])
        stop = start + len(ids)
        positions = torch.arange(start, stop, device=self._device)
        mask = None
        if start and len(ids) > 1:  # from the start on, SDPA's own causal mask is the one
            mask = torch.arange(stop, device=self._device) <= positions[:, None]
            mask = mask[None, None]
        self._cache.at_row(row, start, stop)
        kept = {"none": slice(0, 0), "last": slice(-1, None), "all": slice(None)}[want]
        logits = self._forward(torch.tensor([list(ids)]), positions[None], mask, torch.arange(len(ids))[kept])
        self._slots.lengths[row] = stop
        return self._on_host(logits[0])

    @torch.inference_mode()
    def step(self, slots: Sequence[int], ids: Sequence[int]) -> Logits:
        rows = self._slots.front(slots)
        in_order = np.empty(len(rows), np.int64)  # the network sees the rows as they lie
        in_order[rows] = ids
        before = self._slots.lengths[: len(rows)].copy()
        lengths = torch.from_numpy(before).to(self._device)
        longest = int(before.max()) + 1
        mask = None
        if before.min() < before.max():
            unseen = torch.arange(longest, device=self._device) > lengths[:, None]
            mask = torch.zeros(unseen.shape, dtype=self._dtype, device=self._device).masked_fill_(unseen, -math.inf)
            mask = mask[:, None, None]
        self._cache.at_front(len(rows), lengths, longest)
        logits = self._forward(torch.from_numpy(in_order)[:, None], lengths[:, None], mask, torch.tensor([0]))[:, 0]
        self._slots.lengths[rows] += 1
        if (rows[1:] < rows[:-1]).any():
            logits = logits[torch.from_numpy(rows).to(self._device)]
        return self._on_host(logits)

    @torch.inference_mode()
    def drop(self, slot: int) -> None:
        self._slots.drop(slot)

    def _forward(self, ids: Tensor, positions: Tensor, mask: Tensor | None, kept: Tensor) -> Tensor:
        """Logits [rows, len(kept), vocab_size] at the places `kept` of `ids` [rows, tokens]."""
        found: Tensor = self._model(
            input_ids=ids.to(self._device),
            position_ids=positions,
            attention_mask=mask,
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=kept.to(self._device),
        ).logits
        return found

    def _on_host(self, logits: Tensor) -> Logits:
        logits = logits.float()
        if self._host is not None and len(logits) <= len(self._host):
            pinned = self._host[: len(logits)].copy_(logits, non_blocking=True)
            torch.cuda.current_stream(self._device).synchronize()
            return pinned.numpy()
        return logits.cpu().numpy()


class _SlotCache(Cache):
    """What transformers' layers write keys and values to, and read them from: rows of `Slots`."""

    def __init__(self, slots: Slots) -> None:
        super().__init__(layers=[])
        self._slots = slots

    def at_row(self, row: int, start: int, stop: int) -> None:
        """Next come the tokens `start` to `stop` of one row."""
        self._written: Any = (slice(row, row + 1), slice(None), slice(start, stop))
        self._read, self._one_each = (slice(row, row + 1), slice(None), slice(stop)), False

    def at_front(self, num_rows: int, lengths: Tensor, longest: int) -> None:
        """Next comes one token of each of the first rows, behind those that it has."""
        self._written = (torch.arange(num_rows, device=lengths.device), slice(None), lengths)
        self._read, self._one_each = (slice(num_rows), slice(None), slice(longest)), True

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Keep [rows, key heads, tokens, width]; give all of those rows, up to the longest."""
        arrays = self._slots.arrays[2 * layer_idx : 2 * layer_idx + 2]
        for array, states in zip(arrays, (key_states, value_states), strict=True):
            array[self._written] = states[:, :, 0] if self._one_each else states
        keys, values = (array[self._read] for array in arrays)
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
    **others: Any,
) -> tuple[Tensor, None]:
    """SDPA as transformers calls it: query [rows, heads, tokens, width], key and value [rows, key heads, seen, width]
    -> [rows, tokens, heads, width]. Heads that share keys read them where they lie: nothing is repeated."""
    if unknown := [name for name in ("sliding_window", "s_aux", "softcap") if others.get(name) is not None]:
        raise UnsupportedModel(
            f"{type(module).__name__} asks for {', '.join(unknown)}, which this runtime has not: serve with vLLM"
        )
    rows, heads, tokens, width = query.shape
    if tokens == 1:  # heads that share keys are like so many queries of one head
        grouped = query.reshape(rows, key.shape[1], -1, width)
        found = scaled_dot_product_attention(grouped, key, value, attn_mask=attention_mask, scale=scaling)
        return found.reshape(rows, 1, heads, width), None
    found = scaled_dot_product_attention(
        query, key, value, attn_mask=attention_mask, is_causal=attention_mask is None, scale=scaling,
        enable_gqa=heads > key.shape[1],
    )  # fmt: skip
    return found.transpose(1, 2).contiguous(), None


def zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros whose pages cost no memory on a CPU before they are written; torch.zeros would write them all."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    return torch.from_numpy(np.zeros(math.prod(shape) * dtype.itemsize, np.uint8)).view(dtype).view(shape)


def _check_kind(model: PreTrainedModel, context_tokens: int) -> None:
    config = model.config
    if not hasattr(config, "num_key_value_heads"):
        raise UnsupportedModel(f"{type(model).__name__} keeps no keys and values as Llama does: serve it with vLLM")
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    if kinds != {"full_attention"} or (not hasattr(config, "layer_types") and getattr(config, "sliding_window", None)):
        raise UnsupportedModel(
            f"{type(model).__name__} has layers that are no full attention ({', '.join(sorted(kinds))}; "
            f"sliding_window={getattr(config, 'sliding_window', None)}): serve it with vLLM"
        )
    rope = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    if rope in ("dynamic", "longrope"):
        raise UnsupportedModel(
            f"rope_type={rope}: positions depend on the longest sequence of a batch, so answers would depend on who "
            f"else asks; serve it with vLLM"
        )
    if context_tokens > config.max_position_embeddings:
        raise UserError(
            f"a context of {context_tokens} tokens is asked for, and the model has {config.max_position_embeddings}: "
            f"serve with at most that"
        )


def _probe_ids(vocab_size: int) -> list[int]:
    return [index * 7919 % vocab_size for index in range(1, 9)]


@torch.inference_mode()
def _logprobs_of_transformers(model: PreTrainedModel) -> Tensor:
    ids = torch.tensor([_probe_ids(model.config.vocab_size)], device=model.device)
    found: Tensor = model(input_ids=ids, use_cache=False).logits[0, 2:].float().cpu().log_softmax(-1)
    return found


def _own_logprobs(runtime: TorchRuntime) -> Tensor:
    """The same, of ids that are fed, fed further and stepped."""
    ids = _probe_ids(runtime.vocab_size)[: runtime.context_tokens]
    found = [runtime.feed(0, ids[:3], "last")]
    if len(ids) > 3:
        found.append(runtime.feed(0, ids[3:6], "all"))
    found += [runtime.step([0], [token]).copy() for token in ids[6:]]
    runtime.drop(0)
    return torch.from_numpy(np.concatenate(found)).log_softmax(-1)
