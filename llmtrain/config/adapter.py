"""`adapter=`: train all weights, or low-rank updates beside frozen ones."""

from typing import Annotated, Literal

from annotated_types import Ge, Gt, Lt, MinLen
from pydantic import Discriminator

from llmtrain.config.base import Added, Changes, Settings


class NoAdapter(Settings):
    """Every weight is trained."""

    kind: Annotated[Literal["none"], Changes.MATHEMATICS, Added(3, "none")]


class _LowRank(Settings):
    rank: Annotated[int, Gt(0), Changes.MATHEMATICS]
    """Rank of each update; it adds rank * (inputs + outputs) parameters to a layer."""
    alpha: Annotated[float, Gt(0), Changes.MATHEMATICS]
    """The update is scaled by alpha / rank, with rslora by alpha / sqrt(rank)."""
    dropout: Annotated[float, Ge(0), Lt(1), Changes.MATHEMATICS]
    """Share of a layer's inputs that its update does not see while training."""
    targets: Annotated[tuple[str, ...], MinLen(1), Changes.MATHEMATICS]
    """Last parts of the names of the linear layers that get an update, such as `q_proj`; `all-linear` means every one
    but the output layer."""
    rslora: Annotated[bool, Changes.MATHEMATICS]
    """Scale by alpha / sqrt(rank), so that a higher rank does not learn more slowly (arXiv 2312.03732)."""
    dora: Annotated[bool, Changes.MATHEMATICS]
    """Train the length of each row of a weight apart from its direction (arXiv 2402.09353)."""


class LoRAAdapter(_LowRank):
    """Low-rank updates of frozen linear layers (arXiv 2106.09685)."""

    kind: Annotated[Literal["lora"], Changes.MATHEMATICS]


class QLoRAAdapter(_LowRank):
    """Low-rank updates of linear layers that are frozen in 4 bits (arXiv 2305.14314). Needs CUDA and bitsandbytes."""

    kind: Annotated[Literal["qlora"], Changes.MATHEMATICS]
    quantization: Annotated[Literal["nf4", "fp4"], Changes.MATHEMATICS]
    """The 16 values that a frozen weight can have: those of a normal distribution's quantiles, or 4-bit floats."""
    double_quantization: Annotated[bool, Changes.MATHEMATICS]
    """Quantise the scale of each block of 64 weights too: 0.4 bits a weight less."""


Adapter = Annotated[NoAdapter | LoRAAdapter | QLoRAAdapter, Discriminator("kind")]
