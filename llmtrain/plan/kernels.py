"""How long each kernel of a traced step takes on this machine: run once on real tensors of its shapes, then kept.

Large ones are measured on a part (less of the longest dimension; for attention fewer heads) and scaled by their cost.
"""

import json
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmtrain.config.base import content_hash
from llmtrain.files import write_whole
from llmtrain.plan import machine
from llmtrain.plan.trace import Op, Shape

_MOST_FLOPS = 1e9
_MOST_BYTES = 32 * 2**20
_REPEATS = 7
_ENOUGH_S = 0.02
"""A kernel is repeated until it has run that long, `_REPEATS` times at most, at least twice after a warm-up."""


class Kernels:
    """Seconds by kernel, kept in `outputs/plan/kernels-<key>.json`; the key is the machine, its threads and torch."""

    def __init__(self, outputs: Path, identity: dict[str, str]) -> None:
        self.path = outputs / "plan" / f"kernels-{content_hash(identity)[:16]}.json"
        self._seconds: dict[str, float] = json.loads(self.path.read_bytes()) if self.path.exists() else {}
        self._before = len(self._seconds)

    def seconds(self, op: Op) -> float:
        """Of one call; measured where it is not known."""
        key = content_hash(op.key)[:16]
        if key not in self._seconds:
            self._seconds[key] = _measured(op)
        return self._seconds[key]

    def once(self, name: str, measure: Callable[[], float]) -> float:
        """Another figure of this machine, measured where it is not known, and kept."""
        if name not in self._seconds:
            self._seconds[name] = measure()
            self.keep()
        return self._seconds[name]

    def keep(self) -> None:
        """Write what was measured since the last time; not what was measured on a busy machine."""
        if len(self._seconds) > self._before and not machine.is_busy():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(self.path, json.dumps(self._seconds) + "\n")
            self._before = len(self._seconds)


@torch.no_grad()
def _measured(op: Op) -> float:
    args, kwargs, scale = _part(op)
    made = [_real(argument) for argument in args]
    named = {name: _real(value) for name, value in kwargs}
    function: Callable[..., Any] = _function(op.name)
    function(*made, **named)
    times: list[float] = []
    while len(times) < _REPEATS and (len(times) < 2 or sum(times) < _ENOUGH_S):
        start = time.perf_counter()
        function(*made, **named)
        times.append(time.perf_counter() - start)
    return min(times) * scale  # other processes only make it slower


def _part(op: Op) -> tuple[tuple[Any, ...], tuple[tuple[str, Any], ...], float]:
    """(arguments, named arguments, how much more the whole costs)."""
    if "_fused_adam" in op.name or "_foreach" in op.name:
        return _some_of_lists(op)
    if "block_attention" in op.name:  # its segments are numbers among the arguments: no part of it is alike
        return op.args, op.kwargs, 1.0
    args, kwargs, scale = op.args, op.kwargs, 1.0
    cost = max(op.num_flops / _MOST_FLOPS, op.num_bytes / _MOST_BYTES)
    attends = "scaled_dot_product" in op.name
    while cost > 1:
        shapes = [shape for shape in _shapes((args, kwargs)) if shape.size]
        candidates = [
            size for shape in shapes for size in (shape.size[:2] if attends and len(shape.size) > 2 else shape.size)
        ]
        longest = max(candidates, default=1)
        if longest <= (1 if attends else 256):
            break
        shorter = -(-longest // 2)
        args, kwargs = _replaced(args, longest, shorter), _replaced(kwargs, longest, shorter)
        scale *= longest / shorter
        cost *= shorter / longest
    return args, kwargs, scale


def _some_of_lists(op: Op) -> tuple[tuple[Any, ...], tuple[tuple[str, Any], ...], float]:
    """The first tensors of each list, up to `_MOST_BYTES`."""
    lists = [argument for argument in op.args if isinstance(argument, tuple) and argument]
    sizes = [shape.num_bytes for shape in lists[0] if isinstance(shape, Shape)]
    kept, total = 0, 0
    while kept < len(sizes) and (not kept or total + sizes[kept] <= _MOST_BYTES):
        total += sizes[kept]
        kept += 1
    args = tuple(argument[:kept] if isinstance(argument, tuple) else argument for argument in op.args)
    return args, op.kwargs, sum(sizes) / max(1, total)


def _shapes(value: Any) -> Iterable[Shape]:
    if isinstance(value, Shape):
        yield value
    elif isinstance(value, tuple):
        for inner in value:
            yield from _shapes(inner)


def _replaced(value: Any, old: int, new: int) -> Any:
    """Every dimension `old`, also where it is asked for in a list of sizes, becomes `new`."""
    if isinstance(value, Shape):
        if old not in value.size:
            return value
        size = tuple(new if length == old else length for length in value.size)
        order = sorted(range(len(size)), key=lambda dim: (value.stride[dim], -dim))
        strides, step = [0] * len(size), 1
        for dim in order:  # as dense as it was, in the same order of dimensions
            if value.stride[dim]:
                strides[dim], step = step, step * size[dim]
        return Shape(size, tuple(strides), value.dtype)
    if isinstance(value, tuple):
        return tuple(_replaced(inner, old, new) for inner in value)
    return new if type(value) is int and value == old else value


def _real(value: Any) -> Any:
    """A tensor of that shape: small random numbers, or zeros where they are indices."""
    if isinstance(value, Shape):
        length = 1 + sum((size - 1) * stride for size, stride in zip(value.size, value.stride, strict=True))
        if 0 in value.size:
            length = 0
        memory: Tensor = torch.zeros(length, dtype=value.dtype)
        if value.dtype.is_floating_point:
            memory.uniform_(0.01, 0.1)
        return memory.as_strided(value.size, value.stride)
    if isinstance(value, tuple):
        return [_real(inner) for inner in value]
    return value


def _function(name: str) -> Any:
    namespace, operator, overload = name.split(".")
    return getattr(getattr(getattr(torch.ops, namespace), operator), overload)
