"""Weights as small integers with a scale and a zero for each block of a row, rounded so that the outputs stay right.

GPTQ (arXiv 2210.17323): columns are rounded one after the other, and what rounding one changes in the layer's output is
made up for by those that are still to be rounded, as far as the inputs of real text let them.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

DAMPING = 0.01
"""Added to the diagonal of the inputs' second moments, as a share of its mean: the paper's value."""


@dataclass(frozen=True)
class Blocks:
    """A matrix [rows, columns] as integers: weight = scale * (integer - zero), each block of a row with its own two."""

    integers: Tensor
    """uint8 [rows, columns], 0 to 2^bits - 1."""
    scales: Tensor
    """fp32 [rows, blocks]."""
    zeros: Tensor
    """uint8 [rows, blocks]."""

    @property
    def weights(self) -> Tensor:
        """fp32 [rows, columns]."""
        rows, columns = self.integers.shape
        blocks = self.integers.view(rows, self.scales.shape[1], -1)
        return ((blocks.float() - self.zeros[..., None]) * self.scales[..., None]).view(rows, columns)


def grid(weights: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Scale [...] and zero [...] of blocks [..., columns]: from the least to the greatest number, 0 being one of them.

    A narrower range with a smaller square error was tried: it cuts off the weights that matter most.
    """
    most = 2**bits - 1
    low, high = weights.amin(-1).clamp(max=0), weights.amax(-1).clamp(min=0)
    scales = ((high - low) / most).clamp(min=1e-10)
    return scales, (-low / scales).round()


def nearest(weights: Tensor, bits: int, block_size: int) -> Blocks:
    """Each weight [rows, columns] rounded to the nearest on its block's grid; `block_size` divides the columns."""
    blocks = weights.float().view(len(weights), -1, block_size)
    scales, zeros = grid(blocks, bits)
    integers = (blocks / scales[..., None]).round_().add_(zeros[..., None]).clamp_(0, 2**bits - 1)
    return Blocks(integers.to(torch.uint8).view(weights.shape), scales, zeros.to(torch.uint8))


def gptq(weights: Tensor, moments: Tensor, bits: int, block_size: int) -> Blocks:
    """The same, with later columns making up for earlier ones. `moments` [columns, columns]: sum of x x^T, inputs x."""
    factor = _factor(moments.float())
    left, (rows, columns) = weights.float().clone(), weights.shape
    integers = torch.empty(rows, columns, dtype=torch.uint8)
    scales, zeros = torch.empty(rows, columns // block_size), torch.empty(rows, columns // block_size)
    for block, start in enumerate(range(0, columns, block_size)):
        stop = start + block_size
        scale, zero = scales[:, block], zeros[:, block] = grid(left[:, start:stop], bits)
        errors = torch.empty(rows, block_size)
        for column in range(start, stop):
            integer = ((left[:, column] / scale).round() + zero).clamp(0, 2**bits - 1)
            integers[:, column] = integer.to(torch.uint8)
            error = (left[:, column] - (integer - zero) * scale) / factor[column, column]
            left[:, column:stop] -= error[:, None] * factor[column, column:stop]
            errors[:, column - start] = error
        left[:, stop:] -= errors @ factor[start:stop, stop:]
    return Blocks(integers, scales, zeros.to(torch.uint8))


def _factor(moments: Tensor) -> Tensor:
    """The upper Cholesky factor of the inverse of the damped moments; inputs that are always zero count as apart."""
    damped = moments.clone()
    damped.diagonal()[damped.diagonal() == 0] = 1
    damped.diagonal().add_(DAMPING * damped.diagonal().mean())
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    factor: Tensor = torch.linalg.cholesky(inverse, upper=True)
    return factor


@torch.inference_mode()
def quantise(
    model: PreTrainedModel, texts: Sequence[Tensor], bits: int, block_size: int, say: Callable[[str], None]
) -> dict[str, Blocks]:
    """Each linear layer inside the decoder's blocks, by its name. `model` is left with what the integers give.

    One block after the other, each with the inputs that the rounded blocks before it give on `texts` ([tokens] each).
    """
    found = dict[str, Blocks]()
    decoder = model.get_decoder()
    passes = _inputs_of_first(model, decoder.layers[0], texts)
    for number, block in enumerate(decoder.layers):
        linears = {name: layer for name, layer in block.named_modules() if isinstance(layer, nn.Linear)}
        with _second_moments(linears) as moments:
            for hidden, rest in passes:
                block(hidden, **rest)
        for name, layer in linears.items():
            blocks = gptq(layer.weight, moments[name], bits, block_size)
            layer.weight.copy_(blocks.weights)
            found[f"model.layers.{number}.{name}"] = blocks
        passes = [(block(hidden, **rest), rest) for hidden, rest in passes]
        say(f"rounded block {number + 1} of {len(decoder.layers)}")
    return found


class _Enough(Exception):
    """Raised by the first block: what it was called with is known."""


def _inputs_of_first(
    model: PreTrainedModel, first: nn.Module, texts: Sequence[Tensor]
) -> list[tuple[Tensor, dict[str, Any]]]:
    """What the first block is called with, text by text."""
    found: list[tuple[Tensor, dict[str, Any]]] = []

    def keep(_: nn.Module, arguments: tuple[Tensor], named: dict[str, Any]) -> None:
        found.append((arguments[0], named))
        raise _Enough

    hook = first.register_forward_pre_hook(keep, with_kwargs=True)
    try:
        for ids in texts:
            with suppress(_Enough):
                model(ids[None], use_cache=False)
    finally:
        hook.remove()
    return found


@contextmanager
def _second_moments(linears: dict[str, nn.Linear]) -> Iterator[dict[str, Tensor]]:
    """By layer: the sum of x x^T over all inputs x that pass through it inside."""
    moments = {name: torch.zeros(layer.in_features, layer.in_features) for name, layer in linears.items()}

    def watch(name: str) -> Callable[[nn.Module, tuple[Tensor]], None]:
        def add(_: nn.Module, arguments: tuple[Tensor]) -> None:
            inputs = arguments[0].flatten(0, -2).float()
            moments[name].addmm_(inputs.T, inputs)

        return add

    hooks = [layer.register_forward_pre_hook(watch(name)) for name, layer in linears.items()]
    try:
        yield moments
    finally:
        for hook in hooks:
            hook.remove()
