"""The trained weights rounded as a right engine of less precision rounds them: what it may differ by is measured so."""

from copy import deepcopy
from dataclasses import dataclass
from typing import Literal, cast

from torch import Tensor, nn
from transformers import PreTrainedModel

from llmtrain.artifacts import OptimisedModel
from llmtrain.errors import UnsupportedModel

Bits = Literal[4, 8]


@dataclass(frozen=True)
class Rounding:
    """How a form's weights are made integers: blocks of a row that share a scale and a zero."""

    bits: Bits
    block: int | None
    """Weights that share them; None: a whole row."""
    head_bits: Bits | None
    """Of the output layer, and of the embedding where the two are one; None: it is not rounded."""
    products: Literal["int8", "fp32", "bf16"]
    """int8: inputs of each layer are rounded too, 32 together."""

    def __str__(self) -> str:
        return f"int{self.bits}"


Precision = Literal["fp32", "bf16"] | Rounding


def precision_of(record: OptimisedModel) -> Precision:
    """What a form is to be held against, by the settings that made it.

    Raises UnsupportedModel for settings that this cannot follow.
    """
    bits: Bits = 8 if record.form.endswith("int8") else 4
    match record.form, record.settings:
        case "onnx_fp32", _:
            return "fp32"
        case "onnx_int8" | "onnx_int4", {"block_size": int(block), "head_bits": 4 | 8 as head, "products": products}:
            return Rounding(bits, block, cast(Bits, head), "int8" if products == "int8" else "fp32")
        case "safetensors_int8" | "safetensors_int4", {"block_size": int() | None as block}:
            return Rounding(bits, block, None, "bf16")
    raise UnsupportedModel(
        f"{record.path}: there is no rule for what {record.form}, made with {record.settings}, may differ by; "
        f"make it by `llmtrain optimise`"
    )


def rounded(model: PreTrainedModel, precision: Precision) -> PreTrainedModel:
    """A copy of an fp32 `model` that computes as one of `precision`: every number to the nearest one that it has.

    It is the plainest method; MatMulNBits of ONNX Runtime at accuracy level 4 computes the same. Methods that look at
    real inputs, such as GPTQ, differ by less.
    """
    copy = deepcopy(model)
    if isinstance(precision, Rounding):
        head = copy.get_output_embeddings().weight
        weights = {id(layer.weight): layer.weight for layer in _linear_layers(copy)}  # tied ones once
        for weight in weights.values():
            if bits := precision.head_bits if weight is head else precision.bits:
                weight.data = nearest(weight.data, precision.block or weight.shape[-1], bits)
        if precision.products == "int8":
            for layer in _linear_layers(copy):
                layer.register_forward_pre_hook(_round_inputs)
    if precision == "bf16" or (isinstance(precision, Rounding) and precision.products == "bf16"):
        for parameter in copy.parameters():  # not the buffers: every engine keeps the rotary frequencies exact
            parameter.data = parameter.data.bfloat16()
    return copy


def nearest(values: Tensor, block: int, bits: Bits) -> Tensor:
    """Each block along the last dimension to the nearest of 2^bits levels: whole multiples of a scale, 0 among them,
    from its least value to its largest."""
    most, width = 2**bits - 1, values.shape[-1]
    blocks = nn.functional.pad(values, (0, -width % block)).reshape(*values.shape[:-1], -1, block)
    low, high = blocks.amin(-1, keepdim=True).clamp(max=0), blocks.amax(-1, keepdim=True).clamp(min=0)
    scale = ((high - low) / most).clamp(min=1e-10)
    zero = (-low / scale).round()
    levels = ((blocks / scale).round() + zero).clamp(0, most)
    found: Tensor = ((levels - zero) * scale).flatten(-2)[..., :width]
    return found


def _linear_layers(model: nn.Module) -> list[nn.Linear]:
    return [layer for layer in model.modules() if isinstance(layer, nn.Linear)]


def _round_inputs(layer: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """In blocks of 32, symmetric, as ONNX Runtime does whatever the weights' blocks are."""
    width = inputs[0].shape[-1]
    blocks = nn.functional.pad(inputs[0], (0, -width % 32)).reshape(*inputs[0].shape[:-1], -1, 32)
    scale = (blocks.abs().amax(-1, keepdim=True) / 127).clamp(min=1e-10)
    return (((blocks / scale).round() * scale).flatten(-2)[..., :width], *inputs[1:])
