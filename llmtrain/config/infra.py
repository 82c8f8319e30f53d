"""`infra=`: where and how fast. Nothing here may change what is computed, but for the precision."""

from typing import Annotated, Literal

from annotated_types import Gt

from llmtrain.config.base import Changes, Settings


class LocalInfra(Settings):
    """This machine."""

    kind: Annotated[Literal["local"], Changes.SURFACE]
    accelerator: Annotated[Literal["cpu", "cuda"], Changes.PERFORMANCE]
    """Where tensors live."""
    precision: Annotated[Literal["fp32", "bf16", "bf16_if_fast"], Changes.MATHEMATICS]
    """`bf16`: autocast, weights and optimizer stay fp32. `bf16_if_fast` is resolved before the config is frozen: bf16
    where the hardware multiplies it natively, otherwise fp32."""
    threads: Annotated[int | None, Gt(0), Changes.PERFORMANCE]
    """CPU threads for PyTorch; null takes every core that the process may use."""
    micro_batch_tokens: Annotated[int, Gt(0), Changes.PERFORMANCE]
    """Most tokens, padding included, that pass through the model at once."""
    loss_chunk_tokens: Annotated[int, Gt(0), Changes.PERFORMANCE]
    """Tokens whose logits exist at the same time: the loss needs chunk * vocabulary numbers, never a whole batch's."""
    deterministic: Annotated[bool, Changes.PERFORMANCE]
    """Refuse kernels whose result depends on the order of execution; slower on a GPU."""


Infra = LocalInfra
