"""What this machine can do: resolved once, before the config is frozen."""

import os
from pathlib import Path
from typing import Literal

import torch

from llmtrain.config.infra import Infra
from llmtrain.errors import UserError


def resolve(infra: Infra) -> Infra:
    """`infra` with `bf16_if_fast` replaced by what this machine multiplies natively.

    Raises UserError where the accelerator is missing.
    """
    if infra.accelerator == "cuda" and not torch.cuda.is_available():
        raise UserError(
            "infra.accelerator=cuda, but PyTorch sees no CUDA device: choose infra=local_cpu, "
            "or install a CUDA build of torch and check nvidia-smi"
        )
    if infra.precision != "bf16_if_fast":
        return infra
    fast = torch.cuda.is_bf16_supported(including_emulation=False) if infra.accelerator == "cuda" else _cpu_has_bf16()
    precision: Literal["bf16", "fp32"] = "bf16" if fast else "fp32"
    return infra.model_copy(update={"precision": precision})


def apply(infra: Infra) -> None:
    """Set threads, determinism and the fp32 matrix product's mode for this process."""
    torch.set_num_threads(infra.threads or len(os.sched_getaffinity(0)))
    if infra.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(infra.deterministic)


def autocast(infra: Infra) -> torch.autocast:
    """The context of every forward pass: bf16 matrix products where `infra.precision` says so."""
    return torch.autocast(infra.accelerator, dtype=torch.bfloat16, enabled=infra.precision == "bf16")


def _cpu_has_bf16() -> bool:
    """Does the CPU multiply bf16 itself (AVX512-BF16 or AMX)? Emulated, it is a hundred times slower than fp32."""
    cpuinfo = Path("/proc/cpuinfo")
    flags = cpuinfo.read_text() if cpuinfo.exists() else ""
    return "avx512_bf16" in flags or "amx_bf16" in flags
