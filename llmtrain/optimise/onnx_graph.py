"""The builder's fp32 graph, with its weights stored in 8 or 4 bits, and with logits of the last tokens only if asked.

Of MatMulNBits and GatherBlockQuantized, ONNX Runtime's own operators (com.microsoft): integers of a row lie in blocks,
each with a scale and a zero.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from llmtrain.optimise.gptq import Blocks, nearest

FILE, DATA_FILE = "model.onnx", "model.onnx.data"
HEAD, EMBEDDING = "lm_head.MatMul.weight", "model.embed_tokens.weight"
INT8_PRODUCTS = 4
"""MatMulNBits' accuracy level that rounds the inputs to 8 bits too, block by block, for products of integers."""
FP32_PRODUCTS = 1


@dataclass(frozen=True)
class Storage:
    """How matrices are stored."""

    body_bits: int
    head_bits: int
    """Of the output layer and the embedding."""
    block_size: int
    """Columns that share a scale."""
    integer_products: bool


def quantise(graph: onnx.GraphProto, storage: Storage, rounded: Mapping[str, Blocks]) -> None:
    """Replace each product with a constant matrix, and the embedding, in place.

    `rounded` has matrices that were rounded already, by transformers' names; others take the nearest numbers.
    """
    weights = {one.name: one for one in graph.initializer}
    tied = next((node for node in graph.node if node.op_type == "Transpose" and node.input[0] == HEAD), None)
    nodes: list[onnx.NodeProto] = []
    for node in graph.node:
        if node.op_type == "MatMul" and node.input[1] in weights:
            name = node.input[1]
            blocks = _rounded(name, rounded)
            if blocks is None:
                bits = storage.head_bits if name == HEAD else storage.body_bits
                matrix = torch.from_numpy(numpy_helper.to_array(weights[name]).T.copy())
                blocks = nearest(matrix, bits, storage.block_size)
            else:
                bits = storage.body_bits
            graph.initializer.extend(_stored(name, blocks, bits))
            nodes.append(_product(node, blocks, bits, storage))
            weights.pop(name)
        elif node.op_type == "Gather" and node.input[0] == EMBEDDING:
            matrix = torch.from_numpy(numpy_helper.to_array(weights.pop(EMBEDDING)).copy())
            graph.initializer.extend(
                _stored(EMBEDDING, nearest(matrix, storage.head_bits, storage.block_size), storage.head_bits, flat=True)
            )
            nodes.append(_lookup(node, EMBEDDING, storage))
        elif tied is not None and node.op_type == "Gather" and node.input[0] == tied.output[0]:
            columns = numpy_helper.to_array(weights[HEAD]).shape[0] * storage.head_bits // 8
            shape = helper.make_node("Constant", [], [f"{HEAD}.shape"], value_ints=[-1, columns])
            rows = helper.make_node("Reshape", [f"{HEAD}.integers", f"{HEAD}.shape"], [f"{HEAD}.rows"])
            nodes += [shape, rows, _lookup(node, HEAD, storage)]
        elif node is not tied:
            nodes.append(node)
    kept = [
        one for one in graph.initializer if one.name in weights or one.name.endswith((".integers", ".scales", ".zeros"))
    ]
    del graph.initializer[:], graph.node[:]
    graph.initializer.extend(kept)
    graph.node.extend(nodes)


def save(model: onnx.ModelProto, directory: Path) -> None:
    """`model.onnx`, its weights in a file beside it."""
    onnx.save_model(model, str(directory / FILE), save_as_external_data=True, location=DATA_FILE, size_threshold=1024)


def _rounded(name: str, rounded: Mapping[str, Blocks]) -> Blocks | None:
    """`model.layers.3.attn.qkv_proj.MatMul.weight` is q, k and v below each other."""
    layer = name.removesuffix(".MatMul.weight").replace(".attn.", ".self_attn.")
    names = [layer.replace("qkv_proj", f"{letter}_proj") for letter in "qkv"] if "qkv_proj" in layer else [layer]
    found = [rounded[one] for one in names if one in rounded]
    if not found:
        return None
    return Blocks(*(torch.cat([getattr(one, part) for one in found]) for part in ("integers", "scales", "zeros")))


def packed(integers: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    """Along the last axis, two 4-bit numbers a byte, the first one in the lower half; an odd last one alone."""
    if bits == 8:
        return integers
    if integers.shape[-1] % 2:
        integers = np.pad(integers, [(0, 0)] * (integers.ndim - 1) + [(0, 1)])
    return integers[..., ::2] | (integers[..., 1::2] << np.uint8(4))


def _stored(name: str, blocks: Blocks, bits: int, flat: bool = False) -> list[onnx.TensorProto]:
    rows, num_blocks = blocks.scales.shape
    integers = packed(blocks.integers.view(rows, num_blocks, -1).numpy(), bits)
    arrays = {
        "integers": integers.reshape(rows, -1) if flat else integers,
        "scales": blocks.scales.numpy(),
        "zeros": packed(blocks.zeros.numpy(), bits),
    }
    return [numpy_helper.from_array(np.ascontiguousarray(array), f"{name}.{part}") for part, array in arrays.items()]


def _product(node: onnx.NodeProto, blocks: Blocks, bits: int, storage: Storage) -> onnx.NodeProto:
    rows, columns = blocks.integers.shape
    name = node.input[1]
    return helper.make_node(
        "MatMulNBits",
        [node.input[0], f"{name}.integers", f"{name}.scales", f"{name}.zeros"],
        list(node.output),
        name=node.name,
        domain="com.microsoft",
        K=columns,
        N=rows,
        bits=bits,
        block_size=storage.block_size,
        accuracy_level=INT8_PRODUCTS if storage.integer_products else FP32_PRODUCTS,
    )


def _lookup(node: onnx.NodeProto, name: str, storage: Storage) -> onnx.NodeProto:
    rows = f"{name}.rows" if name == HEAD else f"{name}.integers"
    return helper.make_node(
        "GatherBlockQuantized",
        [rows, node.input[1], f"{name}.scales", f"{name}.zeros"],
        list(node.output),
        name=node.name,
        domain="com.microsoft",
        bits=storage.head_bits,
        block_size=storage.block_size,
        gather_axis=0,
        quantize_axis=1,
    )
