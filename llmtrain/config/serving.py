"""`serving=`: which engine answers requests, and how many at once. What is served comes from the model's own record."""

from typing import Annotated, Literal

from annotated_types import Ge, Gt, Le, MinLen
from pydantic import Discriminator

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


class VLLMServing(ServingBase):
    """vLLM's own server as a child process, in an environment of its own."""

    kind: Annotated[Literal["vllm"], Changes.PERFORMANCE]
    """Which engine."""
    form: Annotated[Literal["trained", "safetensors_int8", "safetensors_int4"], Changes.MATHEMATICS]
    """`trained`, or a quantised form, made by `llmtrain optimise` first. ONNX models are served by LitServe."""
    python: Annotated[str | None, MinLen(1), Changes.SURFACE]
    """The interpreter that has vLLM; null: the one of `.venv-vllm`, which `scripts/setup-vllm` makes, or this one."""
    compile: Annotated[bool | None, Changes.PERFORMANCE]
    """Compile the model, and on a GPU capture its graphs: a longer start, faster tokens; needs g++ on a CPU. null: on a
    GPU only."""
    kv_cache_gib: Annotated[float, Gt(0), Changes.PERFORMANCE]
    """On a CPU: memory for keys and values of each rank, in GiB."""
    gpu_memory_fraction: Annotated[float, Gt(0), Le(1), Changes.PERFORMANCE]
    """On a GPU: how much of its memory is used, weights, keys and values together."""
    adapters: Annotated[tuple[str, ...], Changes.MATHEMATICS]
    """LoRA adapters as `name:directory` (PEFT's form); requests choose one by giving its name as their model."""
    seed: Annotated[int, Ge(0), Changes.SURFACE]
    """For requests that have none of their own."""


Serving = Annotated[LitServeServing | VLLMServing, Discriminator("kind")]
