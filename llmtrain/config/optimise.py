"""`optimise=`: which other form of a model is made, and what it must reach on the machine that made it."""

from typing import Annotated, Literal

from annotated_types import Ge, Gt, Le, MinLen
from pydantic import Discriminator, model_validator

from llmtrain.config.base import Changes, Settings


class Optimising(Settings):
    """What every form has: the text that it is measured on, how long, and what it must reach."""

    text_paths: Annotated[tuple[str, ...], Changes.MATHEMATICS]
    """UTF-8 files whose text the model's use is like; none: the language reference that Python carries. Half of it
    measures the quality, the other half is what `rounding=gptq` looks at."""
    documents: Annotated[int, Gt(1), Changes.SURFACE]
    """Pieces of that text that measure the quality; intervals are over these."""
    document_tokens: Annotated[int, Gt(1), Changes.SURFACE]
    """Length of each piece; a model with a shorter context takes as much as it can."""
    batch_sizes: Annotated[tuple[Annotated[int, Gt(0)], ...], MinLen(1), Changes.SURFACE]
    """Sequences computed together, one measurement each; the first one decides whether a form is faster."""
    prompt_tokens: Annotated[int, Gt(0), Changes.SURFACE]
    """Length of each prompt in the measurement of speed."""
    new_tokens: Annotated[int, Gt(0), Changes.SURFACE]
    """Tokens that follow each prompt; the median of their times counts."""
    rounds: Annotated[int, Gt(0), Changes.SURFACE]
    """Times that PyTorch and the form take turns, each time in a process of its own; the median counts."""
    most_perplexity_increase: Annotated[float, Ge(0), Changes.SURFACE]
    """A form whose perplexity is higher than PyTorch's in fp32 by more than this share is refused."""
    least_agreement: Annotated[float, Ge(0), Le(1), Changes.SURFACE]
    """Share of positions at which a form must find the same token likeliest as PyTorch in fp32, or it is refused."""


class OnnxOptimise(Optimising):
    """ONNX with a KV cache, for ONNX Runtime; batch and length are free."""

    kind: Annotated[Literal["onnx"], Changes.MATHEMATICS]
    """Which exporter."""
    form: Annotated[Literal["onnx_fp32", "onnx_int8", "onnx_int4"], Changes.MATHEMATICS]
    """What is made. The following four are about `onnx_int8` and `onnx_int4`."""
    rounding: Annotated[Literal["nearest", "gptq"], Changes.MATHEMATICS]
    """How weights become integers: each the nearest one, or by GPTQ (arXiv 2210.17323), which takes minutes for 100 M
    parameters and loses less: 13 % of perplexity instead of 19 % at 4 bits."""
    block_size: Annotated[Literal[16, 32, 64, 128, 256], Changes.MATHEMATICS]
    """Weights of a row that share a scale and a zero (5 bytes, or 4.5): less is finer and larger. It must divide the
    model's widths."""
    head_bits: Annotated[Literal[4, 8], Changes.MATHEMATICS]
    """Of the embedding and the output layer, which lose most by 4 bits; at least as many as the other layers have."""
    products: Annotated[Literal["int8", "fp32"], Changes.MATHEMATICS]
    """What products are computed in: `int8` rounds the inputs of each layer to 8 bits as well, block by block, which is
    faster wherever the CPU multiplies such integers."""
    calibration_documents: Annotated[int, Gt(0), Changes.MATHEMATICS]
    """Pieces of text that `rounding=gptq` looks at."""
    providers: Annotated[tuple[str, ...], MinLen(1), Changes.PERFORMANCE]
    """ONNX Runtime's execution providers, the best first; those that this machine lacks are left out, which is said."""

    @model_validator(mode="after")
    def falls_back(self) -> "OnnxOptimise":
        if self.providers[-1] != "CPUExecutionProvider":
            raise ValueError("providers must end with CPUExecutionProvider, which computes what the others cannot")
        return self


class TorchAoOptimise(Optimising):
    """Safetensors with quantised weights (torchao), which transformers and vLLM load."""

    kind: Annotated[Literal["torchao"], Changes.MATHEMATICS]
    """Which library."""
    form: Annotated[Literal["safetensors_int8", "safetensors_int4"], Changes.MATHEMATICS]
    """What is made. 4 bits need CUDA and the package mslk-cuda."""
    block_size: Annotated[Literal[32, 64, 128, 256] | None, Changes.MATHEMATICS]
    """Weights of a row that share a scale; null: the whole row, which 4 bits cannot."""

    @model_validator(mode="after")
    def has_blocks(self) -> "TorchAoOptimise":
        if self.form == "safetensors_int4" and self.block_size is None:
            raise ValueError("safetensors_int4 needs blocks: set optimise.block_size=128")
        return self


Optimise = Annotated[OnnxOptimise | TorchAoOptimise, Discriminator("kind")]
