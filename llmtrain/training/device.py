"""What this machine can do: resolved once, before the config is frozen."""

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts
from transformers import PreTrainedModel

from llmtrain.config.hardware import PublishedHardware
from llmtrain.config.infra import Infra
from llmtrain.config.launch import LocalLaunch
from llmtrain.errors import UnsupportedModel, UserError
from llmtrain.models import logit_kernels
from llmtrain.models.attention import Kernel


def resolve(infra: Infra) -> Infra:
    """`infra` with `bf16_if_fast` replaced by what this machine multiplies natively.

    Raises UserError where the run is for this machine and its accelerator is missing.
    """
    if isinstance(infra.launch, LocalLaunch):
        check(infra)
    if infra.precision != "bf16_if_fast":
        return infra
    fast = torch.cuda.is_bf16_supported(including_emulation=False) if infra.accelerator == "cuda" else _cpu_has_bf16()
    precision: Literal["bf16", "fp32"] = "bf16" if fast else "fp32"
    return infra.model_copy(update={"precision": precision})


def check(infra: Infra) -> None:
    """Raises UserError where this machine lacks the accelerator, a compiler, or a kernel that was asked for by name."""
    if infra.accelerator == "cuda" and not torch.cuda.is_available():
        raise UserError(
            "infra.accelerator=cuda, but PyTorch sees no CUDA device: choose infra=local_cpu, "
            "or install a CUDA build of torch and check nvidia-smi"
        )
    if infra.compile and infra.accelerator == "cpu":
        _check_compiler()
    if infra.loss_kernel == "liger" and not logit_kernels.is_installed():
        raise UserError("infra.loss_kernel=liger: " + NO_LIGER.format("liger-kernel is not installed"))


def _check_compiler() -> None:
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler as error:
        raise UserError(
            f"infra.compile=true needs a C++ compiler: {str(error).rstrip('.')}. Install one (apt-get install g++), "
            f"name yours in the environment variable CXX, or set infra.compile=false"
        ) from error


def is_known(infra: Infra) -> bool:
    """Whether a plan can be made here: of this machine for itself, or of a published device."""
    return isinstance(infra.launch, LocalLaunch) or isinstance(infra.hardware, PublishedHardware)


def apply(infra: Infra) -> None:
    """Set threads, determinism and the fp32 matrix product's mode for this process, one of its machine's ranks."""
    on_this_machine = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    torch.set_num_threads(infra.threads or max(1, len(os.sched_getaffinity(0)) // on_this_machine))
    if infra.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(infra.deterministic)
    # NaN into all that is allocated costs a fifth of a step
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    os.environ.setdefault("DS_ACCELERATOR", infra.accelerator)  # accelerate imports DeepSpeed, which else warns of it


def attention_kernel(infra: Infra) -> Kernel:
    """The kernel of packed rows that `infra.attention` means on this machine."""
    if infra.attention != "auto":
        return infra.attention
    if infra.accelerator == "cuda":
        return "flex"
    return "compiled_segments" if infra.compile else "segments"


NO_LIGER = "{}; pip install 'llmtrain[cuda]', or set infra.loss_kernel=auto"


def use_loss_kernel(infra: Infra) -> str:
    """Let this process compute by what `infra.loss_kernel` means on its device; in words. Liger's is tried first.

    Raises UserError where Liger's was asked for by name and cannot be used.
    """
    reason = None
    if infra.loss_kernel == "liger" or (infra.loss_kernel == "auto" and infra.accelerator == "cuda"):
        reason = logit_kernels.why_not_liger(infra.accelerator)
        if reason and infra.loss_kernel == "liger":
            raise UserError("infra.loss_kernel=liger: " + NO_LIGER.format(reason))
        logit_kernels.use("torch" if reason else "liger")
    else:
        logit_kernels.use("torch")
    return f"loss by {logit_kernels.chosen()}" + (f" ({reason})" if reason else "")


def prepare(model: PreTrainedModel, infra: Infra) -> None:
    """Recompute activations and compile, block by block, as `infra` says; names and weights stay as they are."""
    for block in blocks(model):
        match infra.activation_checkpointing:
            case "none":
                pass
            case "selective":
                contexts = partial(create_selective_checkpoint_contexts, EXPENSIVE)
                block.forward = _recomputed(block.forward, context_fn=contexts)
            case "full":
                block.forward = _recomputed(block.forward)
        if infra.compile:
            block.compile(dynamic=False)


def _recomputed(forward: Callable[..., Any], **how: Any) -> Callable[..., Any]:
    """`forward` under activation checkpointing. A function: torch.compile leaves a `partial` uncompiled."""

    def recomputed(*args: Any, **kwargs: Any) -> Any:
        return checkpoint(forward, *args, use_reentrant=False, **how, **kwargs)

    return recomputed


def blocks(model: PreTrainedModel) -> list[nn.Module]:
    """The decoder blocks. Raises UnsupportedModel where the network does not name them as transformers' models do."""
    wanted = set(model._no_split_modules or ())
    found = [module for module in model.modules() if type(module).__name__ in wanted]
    if not found:
        raise UnsupportedModel(
            f"{type(model).__name__} does not say which of its modules are blocks; set infra.compile=false and "
            f"infra.activation_checkpointing=none"
        )
    return found


EXPENSIVE = [
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten.bmm.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.higher_order.flex_attention,
    torch.ops.llmtrain.block_attention.default,
    torch.ops.llmtrain.compiled_block_attention.default,
]
"""What selective checkpointing keeps: matrix products and attention; the rest is cheap to compute again."""


def autocast(infra: Infra) -> torch.autocast:
    """The context of every forward pass: bf16 matrix products where `infra.precision` says so."""
    return torch.autocast(infra.accelerator, dtype=torch.bfloat16, enabled=infra.precision == "bf16")


def _cpu_has_bf16() -> bool:
    """Does the CPU multiply bf16 itself (AVX512-BF16 or AMX)? Emulated, it is a hundred times slower than fp32."""
    cpuinfo = Path("/proc/cpuinfo")
    flags = cpuinfo.read_text() if cpuinfo.exists() else ""
    return "avx512_bf16" in flags or "amx_bf16" in flags
