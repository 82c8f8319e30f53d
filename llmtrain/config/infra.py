"""`infra=`: where and how fast. Nothing here may change what is computed, but for the precision."""

from typing import Annotated, Literal

from annotated_types import Gt
from pydantic import model_validator

from llmtrain.config.base import Added, Changes, Settings
from llmtrain.config.hardware import Hardware
from llmtrain.config.launch import Launch, LocalLaunch, RayLaunch


class Infra(Settings):
    """The devices, how they compute, and who starts the processes there."""

    accelerator: Annotated[Literal["cpu", "cuda"], Changes.PERFORMANCE]
    """Where tensors live."""
    precision: Annotated[Literal["fp32", "bf16", "bf16_if_fast"], Changes.MATHEMATICS]
    """`bf16`: autocast, weights and optimizer stay fp32. `bf16_if_fast` is resolved before the config is frozen: bf16
    where the hardware multiplies it natively, otherwise fp32."""
    threads: Annotated[int | None, Gt(0), Changes.PERFORMANCE]
    """CPU threads for PyTorch, of each rank; null shares out every core that the process may use."""
    ranks: Annotated[int, Gt(0), Changes.PERFORMANCE, Added(3, 1)]
    """Processes that train together, one on each device; more than one are started by torchrun from the frozen config.
    Any number gives the same result within rounding."""
    strategy: Annotated[
        Literal["ddp", "fsdp2", "deepspeed_zero2", "deepspeed_zero3", "tensor_parallel"],
        Changes.PERFORMANCE,
        Added(3, "ddp"),
    ]
    """How ranks share the work: `ddp` copies the model; `fsdp2` and `deepspeed_zero3` share out weights, gradients and
    optimizer, `deepspeed_zero2` the last two; `tensor_parallel` cuts each matrix. One rank uses none of them."""
    offload: Annotated[bool, Changes.PERFORMANCE, Added(3, False)]
    """Keep the optimizer (`deepspeed_zero2`), or weights and optimizer (`deepspeed_zero3`, `fsdp2`), in the host's
    memory."""
    micro_batch_tokens: Annotated[int, Gt(0), Changes.PERFORMANCE]
    """Most tokens that pass through the model at once, on one rank."""
    loss_chunk_tokens: Annotated[int, Gt(0), Changes.PERFORMANCE]
    """Tokens whose logits exist at the same time: the loss needs chunk * vocabulary numbers, never a whole batch's."""
    loss_kernel: Annotated[Literal["auto", "torch", "liger"], Changes.PERFORMANCE, Added(5, "torch")]
    """What makes log-probabilities and their gradients of logits: `torch`'s operators, in fp32, or `liger`'s kernel, in
    place and in the logits' type, with a quarter of the memory traffic of bf16. CUDA, with liger-kernel installed;
    `auto` takes it where it can be used. Said at the start."""
    attention: Annotated[Literal["auto", "segments", "sdpa", "flex"], Changes.PERFORMANCE, Added(3, "auto")]
    """The kernel of packed rows: `segments` runs each document on its own, `sdpa` the whole row under a mask, `flex` is
    FlexAttention with a block mask; `auto` takes `flex` on CUDA and `segments` elsewhere. Said at the start."""
    compile: Annotated[bool, Changes.PERFORMANCE, Added(3, False)]
    """torch.compile for each decoder block: a minute at the first step, faster steps; rows are padded to
    `micro_batch_tokens`, so that shapes stay the same: choose it so that they are nearly full. A CPU needs a C++
    compiler."""
    activation_checkpointing: Annotated[Literal["none", "selective", "full"], Changes.PERFORMANCE, Added(3, "none")]
    """What the backward pass computes again instead of keeping: nothing, all but matrix products and attention, or
    whole blocks. Less memory, up to a third more time."""
    deterministic: Annotated[bool, Changes.PERFORMANCE]
    """Refuse kernels whose result depends on the order of execution; slower on a GPU."""
    hardware: Hardware
    launch: Launch

    @model_validator(mode="after")
    def kernels_fit(self) -> "Infra":
        if self.attention == "flex" and self.accelerator == "cpu":
            raise ValueError("attention=flex has no backward pass on a CPU; set infra.attention=auto")
        if self.loss_kernel == "liger" and self.accelerator == "cpu":
            raise ValueError("loss_kernel=liger needs infra.accelerator=cuda; set infra.loss_kernel=auto")
        if self.attention == "segments" and self.compile:
            raise ValueError("attention=segments would be compiled anew for each row; set infra.attention=auto")
        return self

    @model_validator(mode="after")
    def launcher_fits(self) -> "Infra":
        if isinstance(self.launch, LocalLaunch):
            return self
        if self.precision == "bf16_if_fast":
            raise ValueError(
                f"precision=bf16_if_fast asks the machine that submits, not the one that computes; with "
                f"infra.launch.kind={self.launch.kind} set infra.precision=bf16 or fp32"
            )
        if isinstance(self.launch, RayLaunch) and self.ranks > 1 and 0 < self.launch.gpus_per_rank < 1:
            raise ValueError(
                f"ranks that train together cannot share a GPU: with infra.ranks={self.ranks} set "
                f"infra.launch.gpus_per_rank=1"
            )
        nodes = getattr(self.launch, "nodes", 1)
        if self.ranks % nodes:
            raise ValueError(
                f"infra.ranks={self.ranks} cannot be shared out evenly over infra.launch.nodes={nodes}; "
                f"set infra.ranks={-(-self.ranks // nodes) * nodes}"
            )
        return self
