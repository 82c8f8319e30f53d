"""Where a loss or a gradient first stops being a number: the micro-batches of the step are done once more, watched.

Nothing is watched while all goes well. Without compilation, and with dropout drawn anew.
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from llmtrain.report.records import Trace
from llmtrain.training.batches import MicroBatch

SICKNESS_FILE = "sickness.json"
"""Its name in a run's directory."""


class Origin(Trace):
    """The first part of the network whose result is not finite."""

    micro_batch: int
    """From 1, of those that one rank computes."""
    direction: Literal["forward", "backward"]
    layer: str
    """Its name in the network: a module, or the smallest module around the operation; of a backward pass possibly a
    parameter. `loss` where the output layer's logits, or what is made of them, are not finite."""
    weight: str | None
    """A parameter of the module that is not finite itself."""
    largest_input: float
    """Largest finite magnitude among what went into it."""
    rows: tuple[int, ...]
    """Numbers of the micro-batch's rows, pairs or chats' rows, in its order."""
    token: int | None
    """The first place in the micro-batch's row of tokens that is not finite; null where all are, or none is known."""


class Sickness(Trace):
    """`sickness.json`: why a run stopped."""

    step: int
    """From 1; the weights are those after the step before."""
    tokens: int
    """Trained on, with this step."""
    loss: float
    grad_norm: float
    lr: float
    origin: Origin | None
    """None where a second look found all parts finite, or where weights are shared out over ranks."""

    def told(self) -> str:
        """The origin in a clause."""
        if self.origin is None:
            return "no single layer is to blame"
        origin = self.origin
        because = f", whose {origin.weight} holds values that are not finite" if origin.weight else ""
        rows = ", ".join(map(str, origin.rows[:8])) + (", ..." if len(origin.rows) > 8 else "")
        return (
            f"the {origin.direction} pass first fails at {origin.layer}{because}, in micro-batch {origin.micro_batch} "
            f"(rows {rows})"
        )


def find_origin(
    model: PreTrainedModel, micro_batches: Sequence[MicroBatch], loss: Callable[[MicroBatch], Tensor], backward: bool
) -> Origin | None:
    """The origin of what is not finite in the loss of `micro_batches`, or, with `backward`, in its gradient.

    The gradient that is there is lost then. No rank may do a backward pass alone where ranks come together in one.
    """
    with torch.compiler.set_stance("force_eager"):
        for look in (_forward, _backward) if backward else (_forward,):
            for number, micro_batch in enumerate(micro_batches, 1):
                if found := look(model, micro_batch, loss):
                    return found.model_copy(update={"micro_batch": number})
    return None


def _forward(model: PreTrainedModel, micro_batch: MicroBatch, loss: Callable[[MicroBatch], Tensor]) -> Origin | None:
    found: list[Origin] = []
    num_tokens = micro_batch.packed.num_tokens

    def watch(name: str) -> Callable[..., None]:
        def look(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
            results = _floating(output)
            if found or all(_is_finite(result) for result in results):
                return
            inputs = _floating([args, {key: value for key, value in kwargs.items() if key != "attention_mask"}])
            is_origin = all(_is_finite(tensor) for tensor in inputs)
            found.append(
                _origin(
                    micro_batch,
                    "forward",
                    name if is_origin else _parent(name),
                    inputs,
                    weight=_bad_parameter(module) if is_origin else None,
                    token=_first_bad_token(results, num_tokens),
                )
            )

        return look

    with ExitStack() as hooks, torch.no_grad():
        for name, module in model.named_modules():
            if name:
                hooks.callback(module.register_forward_hook(watch(name), with_kwargs=True).remove)
        value = loss(micro_batch)
    if found:
        return found[0]
    if _is_finite(value):
        return None
    output_layer: nn.Module = model.get_output_embeddings()
    return _origin(micro_batch, "forward", "loss", [], weight=_bad_parameter(output_layer), token=None)


def _backward(model: PreTrainedModel, micro_batch: MicroBatch, loss: Callable[[MicroBatch], Tensor]) -> Origin | None:
    found: list[Origin] = []
    last_clean = ""

    def watch(name: str) -> Callable[..., None]:
        def look(module: nn.Module, of_inputs: Any, of_outputs: Any) -> None:
            nonlocal last_clean
            arriving = _floating(of_outputs)
            if found:
                return
            if not all(_is_finite(gradient) for gradient in arriving):
                place = _common_parent(last_clean, name) if last_clean else "loss"
                found.append(_origin(micro_batch, "backward", place, arriving, weight=None, token=None))
            elif not all(_is_finite(gradient) for gradient in _floating(of_inputs)):
                found.append(_origin(micro_batch, "backward", name, arriving, weight=None, token=None))
            last_clean = name

        return look

    model.zero_grad(set_to_none=True)
    with ExitStack() as hooks:
        for name, module in model.named_modules():
            if name and not list(module.children()):
                hooks.callback(module.register_full_backward_hook(watch(name)).remove)
        loss(micro_batch).backward()  # type: ignore[no-untyped-call]
    bad = [name for name, parameter in model.named_parameters() if not _is_finite(parameter.grad)]
    model.zero_grad(set_to_none=True)
    if found or not bad:
        return found[0] if found else None
    return _origin(micro_batch, "backward", bad[-1], [], weight=None, token=None)


def _origin(
    micro_batch: MicroBatch,
    direction: Literal["forward", "backward"],
    layer: str,
    inputs: list[Tensor],
    weight: str | None,
    token: int | None,
) -> Origin:
    finite = [tensor[tensor.isfinite()].abs() for tensor in inputs]
    largest = max((float(tensor.max()) for tensor in finite if tensor.numel()), default=0.0)
    rows = tuple(micro_batch.indices.tolist())
    return Origin(
        micro_batch=1, direction=direction, layer=layer, weight=weight, largest_input=largest, rows=rows, token=token
    )


def _floating(value: Any) -> list[Tensor]:
    """The tensors of real numbers in a nested result."""
    if isinstance(value, Tensor):
        return [value.detach()] if value.is_floating_point() else []
    if isinstance(value, dict):
        return [tensor for part in value.values() for tensor in _floating(part)]
    if isinstance(value, list | tuple):
        return [tensor for part in value for tensor in _floating(part)]
    return []


def _is_finite(tensor: Tensor | None) -> bool:
    return tensor is None or bool(tensor.isfinite().all())


def _bad_parameter(module: nn.Module) -> str | None:
    names = [name for name, parameter in module.named_parameters(recurse=False) if not _is_finite(parameter.detach())]
    return names[0] if names else None


def _first_bad_token(results: list[Tensor], num_tokens: int) -> int | None:
    """The first of the row's tokens whose result is not finite, where others are."""
    for result in results:
        if result.dim() > 2 and result.shape[:2] == (1, num_tokens):
            bad = ~result[0].isfinite().flatten(1).all(dim=1)
            if bad.any() and not bad.all():
                return int(bad.nonzero()[0])
    return None


def _parent(name: str) -> str:
    return name.rpartition(".")[0]


def _common_parent(one: str, other: str) -> str:
    """The smallest module around both."""
    shared = []
    for left, right in zip(one.split("."), other.split("."), strict=False):
        if left != right:
            break
        shared.append(left)
    return ".".join(shared)
