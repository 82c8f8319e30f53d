"""Matrix products of linear layers by oneDNN: MKL is a tenth slower on AMD's processors (fp32, Zen 4)."""

from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear

WORTH_IT = 2**27
"""Multiplications of a product, below which oneDNN's preparation for each new shape costs more than it saves."""


def use_onednn(model: nn.Module) -> None:
    """Let the linear layers of `model` multiply by oneDNN where that is faster: fp32, an AMD processor, large products.

    Names, weights and hooks stay as they are. A layer that another library has replaced is left alone.
    """
    if not (_is_amd() and torch.backends.mkldnn.is_available()):  # type: ignore[no-untyped-call]
        return
    for module in model.modules():
        if type(module) is nn.Linear:
            module.forward = partial(_forward, module)  # type: ignore[method-assign]


def _forward(layer: nn.Linear, x: Tensor) -> Tensor:
    weight = layer.weight
    plain = type(x) is Tensor and type(weight) is nn.Parameter and x.device.type == "cpu" and layer.bias is None
    large = x.numel() * weight.shape[0] >= WORTH_IT
    if not (plain and large and x.dtype == weight.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")):
        return linear(x, weight, layer.bias)
    return _Linear.apply(x, weight)  # type: ignore[no-any-return, no-untyped-call]


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _product(x, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        rows = prod(x.shape[:-1])
        of_x = _product(upstream, weight.T) if ctx.needs_input_grad[0] else None
        of_weight = None
        if ctx.needs_input_grad[1]:
            of_weight = _product(upstream.reshape(rows, -1).T, x.reshape(rows, -1).T)
        return of_x, of_weight


def _product(left: Tensor, right: Tensor) -> Tensor:
    """left @ right.T: [..., inner], [columns, inner] -> [..., columns]."""
    found: Tensor = torch.ops.mkldnn._linear_pointwise(left, right, None, "none", [], "")
    return found


def _is_amd() -> bool:
    cpuinfo = Path("/proc/cpuinfo")
    return cpuinfo.exists() and "AuthenticAMD" in cpuinfo.read_text()
