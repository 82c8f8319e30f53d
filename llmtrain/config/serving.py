"""`serving=`: which engine answers requests, and how many at once. What is served comes from the model's own record."""

from typing import Annotated, Literal

from annotated_types import Ge, Gt, Le, MinLen

from llmtrain.config.base import Changes, Settings


class ServingBase(Settings):
    """What every engine has."""

    host: Annotated[str, Changes.SURFACE]
    """Address to listen on; 127.0.0.1 is reached from this machine only."""
    port: Annotated[int, Ge(0), Le(65535), Changes.SURFACE]
    """0 takes a free one, which is said."""
    name: Annotated[str | None, MinLen(1), Changes.SURFACE]
    """What requests call the model; null: its name in the registry, or its directory's."""
    context_tokens: Annotated[int | None, Gt(0), Changes.PERFORMANCE]
    """Longest prompt and answer together; null: what the model was made for. Less takes less memory."""
    max_sequences: Annotated[int, Gt(0), Changes.PERFORMANCE]
    """Sequences that are computed together."""
    max_waiting: Annotated[int, Ge(0), Changes.PERFORMANCE]
    """Requests that may wait for a place; further ones get HTTP 429 at once."""
    default_max_tokens: Annotated[int, Gt(0), Changes.SURFACE]
    """Longest answer to a request that does not say `max_tokens`."""
    max_body_bytes: Annotated[int, Gt(0), Changes.SURFACE]
    """Larger requests get HTTP 413."""
    progress_seconds: Annotated[float, Gt(0), Changes.SURFACE]
    """`/health` says 503 where requests wait and no token was computed for so long."""
    start_seconds: Annotated[float, Gt(0), Changes.SURFACE]
    """An engine that is not ready by then is given up."""
    drain_seconds: Annotated[float, Ge(0), Changes.SURFACE]
    """After SIGTERM, requests that are under way may go on for so long."""


class LitServeServing(ServingBase):
    """LitServe with OpenAI's protocol; the model runs in PyTorch or in ONNX Runtime."""

    kind: Annotated[Literal["litserve"], Changes.PERFORMANCE]
    """Which engine."""
    form: Annotated[Literal["trained", "onnx_fp32", "onnx_int8", "onnx_int4"], Changes.MATHEMATICS]
    """`trained` runs in PyTorch; the others in ONNX Runtime, made by `llmtrain optimise` first."""
    prefill_tokens: Annotated[int, Gt(0), Changes.PERFORMANCE]
    """Most tokens of waiting prompts that are computed between two tokens of those under way: less keeps answers
    flowing, more starts new ones sooner."""


Serving = LitServeServing
