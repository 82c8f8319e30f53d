"""How long each kernel of a traced step takes on this machine: run once on real tensors of its shapes, then kept.

Large ones are measured on a part (less of the longest dimension; for attention fewer heads) and scaled by their cost.
"""

import json
import math
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from llmtrain.config.base import content_hash
from llmtrain.files import write_whole
from llmtrain.plan import machine
from llmtrain.plan.trace import Op, Shape, flop_formula

_MOST_FLOPS = 1e9
_MOST_BYTES = 32 * 2**20
_PRODUCT = f"product of {machine.PROBE_SIZE}"
_PASSES, _PASSES_OF_LONG = 3, 9
_LONG = 1.0
"""In products; these are what a step of a network of some size consists of."""
_REPEATS = 3
_ENOUGH_S = 0.01
"""A kernel is repeated until it has run that long, once at least and `_REPEATS` times at most, after a warm-up."""
_SMALL_BYTES = 2**17
"""Arguments up to this size stay in a core's own cache."""
_CACHE_BYTES = 48 * 2**20


class Kernels:
    """Times by kernel, kept in `outputs/plan/kernels-<key>.json`; the key is the machine, its threads and torch.

    Others who use the machine make it slower for parts of a second, twice as slow at times. So a kernel is timed in
    several passes, each time against a product of matrices right before it, and what is kept is how many such products
    it takes. How long one takes undisturbed is kept beside them; how disturbed runs are, they teach by themselves
    (`llmtrain.plan.calibration`).
    """

    def __init__(self, outputs: Path, identity: dict[str, str]) -> None:
        key = content_hash(identity | {"unit": _PRODUCT})[:16]
        self.path = outputs / "plan" / f"kernels-{key}.json"
        self._kept: dict[str, float] = json.loads(self.path.read_bytes()) if self.path.exists() else {}
        self._before = len(self._kept)
        self._probed_at = -math.inf

    def know(self, ops: Iterable[Op]) -> None:
        """Time those that are not known."""
        unknown = {_key(op): op for op in ops if _key(op) not in self._kept}
        if not unknown:
            return
        found: dict[str, list[float]] = {key: [] for key in unknown}
        others, probe = torch.zeros(_CACHE_BYTES, dtype=torch.uint8), machine.Probe()
        for number in range(_PASSES_OF_LONG):
            for key, op in unknown.items():
                if number < _PASSES or found[key][0] > _LONG:
                    product = self._product_now(probe)
                    found[key].append(_measured(op, others) / product)
        self._kept |= {key: median(times) for key, times in found.items()}

    def seconds(self, op: Op) -> float:
        """Of one call of a kernel that is known, undisturbed."""
        return self._kept[_key(op)] * self.product_seconds

    @property
    def product_seconds(self) -> float:
        """Of the product, undisturbed."""
        return self._kept[_PRODUCT]

    def _product_now(self, probe: machine.Probe) -> float:
        """Seconds of the product now, probed anew where that was long ago."""
        if time.perf_counter() - self._probed_at > _ENOUGH_S:
            self._now = probe.product_seconds()
            self._kept[_PRODUCT] = min(self._now, self._kept.get(_PRODUCT, math.inf))
            self._probed_at = time.perf_counter()
        return self._now

    def once(self, name: str, measure: Callable[[], float]) -> float:
        """Another figure of this machine, measured where it is not known, and kept."""
        if name not in self._kept:
            self._kept[name] = measure()
            self.keep()
        return self._kept[name]

    def keep(self) -> None:
        """Write what was measured since the last time; not what was measured on a busy machine."""
        if len(self._kept) > self._before and not machine.is_busy():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(self.path, json.dumps(self._kept) + "\n")
            self._before = len(self._kept)


def _is_large(op: Op) -> bool:
    return sum(shape.num_bytes for shape in _shapes((op.args, op.kwargs))) > _SMALL_BYTES


def _key(op: Op) -> str:
    return content_hash(op.key)[:16]


@torch.no_grad()
def _measured(op: Op, others: Tensor) -> float:
    """Seconds of a call whose arguments lie in memory, as in a step, and not in a cache: `others` take their place."""
    args, kwargs, scale = _part(op)
    made = [_real(argument) for argument in args]
    named = {name: _real(value) for name, value in kwargs}
    function: Callable[..., Any] = _function(op.name)
    function(*made, **named)
    times: list[float] = []
    while len(times) < _REPEATS and sum(times) < _ENOUGH_S:
        if _is_large(op):
            others.add_(1)
        start = time.perf_counter()
        function(*made, **named)
        times.append(time.perf_counter() - start)
    return min(times) * scale


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
        whole = _cost(op.name, args, kwargs)
        args, kwargs = _replaced(args, longest, shorter), _replaced(kwargs, longest, shorter)
        less = _cost(op.name, args, kwargs) / whole  # where two dimensions are equally long, both are halved
        scale /= less
        cost *= less
    return args, kwargs, scale


def _cost(name: str, args: tuple[Any, ...], kwargs: tuple[tuple[str, Any], ...]) -> int:
    """What a call's time is proportional to: FLOPs where a formula knows them, else entries, expanded ones too."""
    if (formula := flop_formula(_function(name))) is not None:
        return formula(*map(_sizes, args), **{key: _sizes(value) for key, value in kwargs})
    return max(1, sum(math.prod(shape.size) for shape in _shapes((args, kwargs))))


def _sizes(value: Any) -> Any:
    if isinstance(value, Shape):
        return value.size
    return tuple(map(_sizes, value)) if isinstance(value, tuple) else value


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
