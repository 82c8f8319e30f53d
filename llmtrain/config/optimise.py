"""`optimise=`: which other form of a model is made, and what it must reach here."""

from typing import Annotated, Literal

from llmtrain.config.base import Changes, Settings


class OnnxOptimise(Settings):
    """ONNX with a KV cache, for ONNX Runtime."""

    kind: Annotated[Literal["onnx"], Changes.MATHEMATICS]
    """Which exporter."""
    form: Annotated[Literal["onnx_fp32", "onnx_int8", "onnx_int4"], Changes.MATHEMATICS]
    """What is made."""


Optimise = OnnxOptimise
