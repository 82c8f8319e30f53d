"""A training step without its numbers: which operators run, on which shapes, and which memory is alive at each moment.

The real code runs on fake tensors (shapes and types, no storage), so that autograd, autocast and checkpointing decide
what is kept exactly as they will in training. Nothing is guessed about an architecture.
"""

import weakref
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import count
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from llmtrain.plan import heap

Part = Literal["weights", "gradients", "optimizer", "activations", "logits", "workspace"]
PARTS: tuple[Part, ...] = ("weights", "gradients", "optimizer", "activations", "logits", "workspace")
Phase = Literal["setup", "forward", "head", "backward", "optimizer"]

_NO_KERNEL = {"aten::_unsafe_view", "aten::detach", "aten::alias", "aten::lift_fresh", "aten::_reshape_alias"}
_QUESTIONS = ("prim::", "profiler::")
"""Operators that ask for a fact and compute nothing."""


@dataclass(frozen=True)
class Shape:
    """What is known of a tensor argument."""

    size: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        """Bytes that reading it touches: a dimension that was expanded counts once."""
        count = 1
        for size, stride in zip(self.size, self.stride, strict=True):
            count *= size if stride else 1
        return count * self.dtype.itemsize


@dataclass(frozen=True)
class Op:
    """One kernel call on given shapes."""

    phase: Phase
    name: str
    args: tuple[Any, ...]
    """The arguments, tensors as `Shape`, lists as tuples."""
    kwargs: tuple[tuple[str, Any], ...]
    num_bytes: int
    """Read and written."""
    num_flops: int
    """By torch.utils.flop_counter: attention counted in full."""

    @property
    def key(self) -> str:
        """Equal for calls that take equally long."""
        return f"{self.name}{self.args}{self.kwargs}"


@dataclass
class Trace:
    """What one traced piece of work did."""

    ops: Counter[Op] = field(default_factory=Counter)
    num_calls: Counter[Phase] = field(default_factory=Counter)
    """Operators called in each phase, those without a kernel (views) too."""
    peaks: dict[Phase, dict[Part, int]] = field(default_factory=dict)
    """Bytes alive, by part, at the fullest moment of each phase."""
    events: list[tuple[int, int]] = field(default_factory=list)
    """Each allocation (block, bytes) and each release (block, 0) in order, and the marks of `llmtrain.plan.heap`."""

    @property
    def peak(self) -> dict[Part, int]:
        """Bytes alive, by part, at the fullest moment of all."""
        return max(self.peaks.values(), key=lambda parts: sum(parts.values()))

    def num_flops(self, *phases: Phase) -> int:
        """In the given phases, or in all; attention counted in full."""
        return sum(op.num_flops * count for op, count in self.ops.items() if not phases or op.phase in phases)


class Tracer(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records into `trace` every operator that runs while it is entered; `phase` is set by the code that is traced."""

    def __init__(self, keeps_logits: bool) -> None:
        """`keeps_logits`: the head takes its largest buffer from the process and not anew, as it does on a CPU."""
        super().__init__()  # type: ignore[no-untyped-call]
        self.keeps_logits = keeps_logits
        self.trace = Trace()
        self._buffers: dict[tuple[torch.dtype, tuple[int, ...]], Tensor] = {}
        self.phase: Phase = "setup"
        self._blocks = count(1)  # addresses come again, these numbers do not
        self._live: dict[int, tuple[int, Any]] = {}
        self._bytes: dict[Part, int] = dict.fromkeys(PARTS, 0)
        self._parts: dict[int, Part] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        name = func._schema.name
        if name.startswith(_QUESTIONS):
            return out
        if self.keeps_logits and self.phase == "head" and name == "aten::new_empty" and out.ndim == 2:
            out = self._buffers.setdefault((out.dtype, tuple(out.shape)), out)
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self.hold(leaf, "logits" if self.phase == "head" else "workspace")
        self.trace.num_calls[self.phase] += 1
        if not (func.is_view or name in _NO_KERNEL):
            self.trace.ops[self._op(func, args, kwargs, out)] += 1
        return out

    def hold(self, tensor: Tensor, part: Part) -> None:
        """Count the tensor's storage, once, until it is released."""
        storage = tensor.untyped_storage()
        address = storage._cdata
        if address in self._live:
            return
        size, block = storage.nbytes(), next(self._blocks)

        def release(_: Any) -> None:
            del self._live[address]
            self._bytes[self._parts.pop(address)] -= size
            self.trace.events.append((block, 0))

        self._live[address] = (size, weakref.ref(storage, release))
        self._parts[address] = part
        self._bytes[part] += size
        self.trace.events.append((block, size))
        before = self.trace.peaks.get(self.phase)
        if before is None or sum(self._bytes.values()) > sum(before.values()):
            self.trace.peaks[self.phase] = dict(self._bytes)

    def declare(self, tensor: Tensor, part: Part) -> None:
        """From now on, count the tensor's storage as `part`."""
        self.hold(tensor, part)
        address = tensor.untyped_storage()._cdata
        self._move(address, self._live[address][0], part)

    def _move(self, address: int, size: int, part: Part) -> None:
        self._bytes[self._parts[address]] -= size
        self._bytes[part] += size
        self._parts[address] = part

    def _op(self, func: Any, args: Any, kwargs: Any, out: Any) -> Op:
        tensors = [leaf for leaf in tree_leaves((args, kwargs, out)) if isinstance(leaf, Tensor)]
        formula = flop_formula(func)
        return Op(
            phase=self.phase,
            name=str(func),
            args=_frozen(args),
            kwargs=tuple((key, _frozen(value)) for key, value in kwargs.items()),
            num_bytes=sum(shape_of(tensor).num_bytes for tensor in tensors),
            num_flops=formula(*args, **kwargs, out_val=out) if formula else 0,
        )

    def begin(self, phase: Phase) -> None:
        """What runs from now on belongs to `phase`. What the forward pass leaves alive is kept for the backward pass,
        by autograd or by checkpointing."""
        if self.phase == "forward":
            for address, (size, _) in self._live.items():
                if self._parts[address] == "workspace":
                    self._move(address, size, "activations")
        if phase == "backward":
            self.trace.events.append(heap.BACKWARD)
        elif self.phase == "backward":
            self.trace.events.append(heap.GRAPH_FREED)
        self.phase = phase


def _cpu_attention_flops(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> int:
    found: int = sdpa_flop_count(query.shape, key.shape, value.shape)  # type: ignore[no-untyped-call]
    return found


def _cpu_attention_backward_flops(
    upstream: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any
) -> int:
    shapes = upstream.shape, query.shape, key.shape, value.shape
    found: int = sdpa_backward_flop_count(*shapes)  # type: ignore[no-untyped-call]
    return found


_CPU_FLOPS = {  # torch counts these on CUDA only
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _cpu_attention_flops,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _cpu_attention_backward_flops,
}


def flop_formula(operator: Any) -> Callable[..., int] | None:
    """FLOPs of a call with the operator's arguments, of whose tensors the sizes suffice; None where none is known."""
    found: Callable[..., int] | None = (flop_registry | _CPU_FLOPS).get(operator._overloadpacket)
    return found


def shapes_of_products(trace: Trace, dtype: torch.dtype) -> set[tuple[Shape, ...]]:
    """The operands of the matrix products in `dtype`, each pair once."""
    products = [op for op in trace.ops if op.name.startswith(("aten.mm", "aten.addmm"))]
    operands = [tuple(arg for arg in op.args if isinstance(arg, Shape))[-2:] for op in products]
    return {shapes for shapes in operands if all(shape.dtype == dtype for shape in shapes)}


def shape_of(tensor: Tensor) -> Shape:
    return Shape(tuple(tensor.shape), tuple(tensor.stride()), tensor.dtype)


def _frozen(value: Any) -> Any:
    value = tree_map(lambda leaf: shape_of(leaf) if isinstance(leaf, Tensor) else leaf, value)
    return _tuples(value)


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, (list, tuple)) else value
