"""A Hugging Face directory as `model.onnx`: onnxruntime-genai's builder writes fp32, and we store the integers."""

import io
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import onnx
import torch

from llmtrain.config.optimise import OnnxOptimise
from llmtrain.errors import UnsupportedModel, UserError
from llmtrain.models import directory as model_directory
from llmtrain.optimise import gptq, onnx_graph
from llmtrain.optimise.texts import Ids


def export(
    source: Path, target: Path, config: OnnxOptimise, calibration: tuple[Ids, ...], say: Callable[[str], None]
) -> None:
    """Write `model.onnx` and `model.onnx.data` into `target`; `calibration` is looked at where `config.rounding` does.

    Raises UnsupportedModel where the builder knows no such architecture, UserError where blocks do not fit its widths.
    """
    rounded: Mapping[str, gptq.Blocks] = {}
    bits = {"onnx_fp32": None, "onnx_int8": 8, "onnx_int4": 4}[config.form]
    with TemporaryDirectory(dir=target) as made:
        say("exporting to ONNX")
        _build(source, Path(made))
        graph = onnx.load(str(Path(made) / onnx_graph.FILE))
        if bits is not None:
            _check_widths(graph, config.block_size)
            if config.rounding == "gptq":
                texts = [torch.tensor(ids) for ids in calibration]
                model = model_directory.load(source)
                rounded = gptq.quantise(model, texts, bits, config.block_size, say)
                del model
            storage = onnx_graph.Storage(
                bits, max(bits, config.head_bits), config.block_size, config.products == "int8"
            )
            say("storing integers")
            onnx_graph.quantise(graph.graph, storage, rounded)
        onnx_graph.save(graph, target)


def _build(source: Path, directory: Path) -> None:
    """The builder's fp32 graph for CPUs, offline. It prints and logs much, of which nothing is kept if it succeeds."""
    from onnxruntime_genai.models.builder import create_model, parse_extra_options

    place = (str(source), str(directory), "fp32", "cpu", str(directory / "cache"))
    words = io.StringIO()
    try:
        with redirect_stdout(words), redirect_stderr(words), _quiet_logs():
            options: dict[str, Any] = parse_extra_options("", *place, ["hf_token=false"])
            create_model("", *place, **options)
    except NotImplementedError as error:
        raise UnsupportedModel(
            f"{source}: onnxruntime-genai cannot export it ({error}); serve it with PyTorch or vLLM"
        ) from error


@contextmanager
def _quiet_logs() -> Iterator[None]:
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


def _check_widths(graph: onnx.ModelProto, block_size: int) -> None:
    """Raises UserError unless blocks fit into each matrix's rows."""
    products = {node.input[1] for node in graph.graph.node if node.op_type == "MatMul"}
    widths = {one.dims[0] for one in graph.graph.initializer if one.name in products}
    if uneven := sorted(width for width in widths if width % block_size):
        fitting = [size for size in (16, 32, 64, 128, 256) if not any(width % size for width in widths)]
        advice = f"set optimise.block_size={fitting[-1]}" if fitting else "export it as onnx_fp32"
        raise UserError(f"blocks of {block_size} weights do not divide the model's width of {uneven[0]}: {advice}")
