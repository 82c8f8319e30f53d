"""PyTorch behind the four verbs: transformers' network, with keys and values kept by us."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import AttentionInterface, PreTrainedModel

from llmtrain.errors import UnsupportedModel, UserError
from llmtrain.models import directory as model_directory
from llmtrain.serving.runtime import Logits, Want
from llmtrain.serving.slots import Slots
from llmtrain.serving.torch_attention import Segment, SlotCache, slot_attention, zeros

ATTENTION = "llmtrain_slots"
"""The name of `slot_attention` in transformers."""
MOST_DIFFERENCE: dict[torch.dtype, float] = {torch.float32: 1e-4, torch.bfloat16: 0.05}
"""Largest mean difference of log-probabilities, in nats, from transformers' own forward pass, on load."""


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

    `threads` is set for this process. The weights are read in fp32 first. Raises CheckpointMismatch where no model
    loads, UnsupportedModel where it needs what this runtime has not (sliding windows, positions that depend on the
    length) or computes something else here than in transformers, and UserError for a device that is missing or a
    context that the model has not.
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
    difference = float((found - expected[: len(found)]).abs().mean())
    if not difference <= MOST_DIFFERENCE[dtype]:
        raise UnsupportedModel(
            f"{type(model).__name__}: log-probabilities differ by {difference:.3g} on average from those of "
            f"transformers' own forward pass, of which {MOST_DIFFERENCE[dtype]} is allowed: serve it with vLLM"
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
        self._cache = SlotCache(self._slots)
        self._host: Tensor | None = None
        if self._device.type == "cuda":
            self._host = torch.empty((max_sequences, self.vocab_size), dtype=torch.float32, pin_memory=True)

    def feed(self, slot: int, ids: Sequence[int], want: Want) -> Logits:
        (logits,) = self.feed_each([(slot, ids, want)])
        return logits

    @torch.inference_mode()
    def feed_each(self, parts: Sequence[tuple[int, Sequence[int], Want]]) -> list[Logits]:
        rows = [self._slots.row(slot, len(ids)) for slot, ids, _ in parts]
        if len(set(rows)) < len(rows):
            raise ValueError("several parts of one sequence: feed them one after the other")
        packed: list[int] = []
        kept: list[NDArray[np.int64]] = []
        segments: list[Segment] = []
        for row, (_, ids, want) in zip(rows, parts, strict=True):
            segments.append(Segment(row, len(packed), len(ids), int(self._slots.lengths[row]), self._device))
            places = np.arange(len(packed), len(packed) + len(ids))
            kept.append({"none": places[:0], "last": places[-1:], "all": places}[want])
            packed += ids
        self._cache.at_segments(segments)
        positions = torch.cat([segment.positions for segment in segments])[None]
        wanted = torch.from_numpy(np.concatenate(kept))
        logits = self._forward(torch.tensor([packed]), positions, wanted, segments=segments)
        for segment in segments:
            self._slots.lengths[segment.row] = segment.stop
        return np.split(self._on_host(logits[0]), np.cumsum([len(places) for places in kept])[:-1])

    @torch.inference_mode()
    def step(self, slots: Sequence[int], ids: Sequence[int]) -> Logits:
        rows = self._slots.front(slots)
        in_order = np.empty(len(rows), np.int64)  # the network sees the rows as they lie
        in_order[rows] = ids
        before = self._slots.lengths[: len(rows)].copy()
        lengths = torch.from_numpy(before).to(self._device)
        longest = int(before.max()) + 1
        equal = bool(before.min() == before.max())
        mask = None
        if not equal:
            unseen = torch.arange(longest, device=self._device) > lengths[:, None]
            mask = torch.zeros(unseen.shape, dtype=self._dtype, device=self._device).masked_fill_(unseen, -math.inf)
            mask = mask[:, None, None]
        self._cache.at_front(lengths, longest, equal=equal)
        ids_2d, wanted = torch.from_numpy(in_order)[:, None], torch.tensor([0])
        logits = self._forward(ids_2d, lengths[:, None], wanted, attention_mask=mask)[:, 0]
        self._slots.lengths[rows] += 1
        if (rows[1:] < rows[:-1]).any():
            logits = logits[torch.from_numpy(rows).to(self._device)]
        return self._on_host(logits)

    @torch.inference_mode()
    def drop(self, slot: int) -> None:
        self._slots.drop(slot)

    def _forward(self, ids: Tensor, positions: Tensor, wanted: Tensor, **attention: Any) -> Tensor:
        """Logits [rows, len(wanted), vocab_size] at the places `wanted` of `ids` [rows, tokens]."""
        found: Tensor = self._model(
            input_ids=ids.to(self._device),
            position_ids=positions,
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=wanted.to(self._device),
            **attention,
        ).logits
        return found

    def _on_host(self, logits: Tensor) -> Logits:
        logits = logits.float()
        if self._host is not None and len(logits) <= len(self._host):
            pinned = self._host[: len(logits)].copy_(logits, non_blocking=True)
            torch.cuda.current_stream(self._device).synchronize()
            return pinned.numpy()
        return logits.cpu().numpy()


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
