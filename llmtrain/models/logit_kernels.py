"""From a chunk of logits to the log-probabilities of targets and their gradients: two kernels that compute the same.

`torch`: PyTorch's operators, in at least fp32: of bf16 logits there is a copy.
`liger`: the Triton kernel of liger-kernel (arXiv 2410.10989), which reads the logits twice and writes them once: a
quarter of the memory traffic of bf16. CUDA.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Literal

import torch
from torch import Tensor

Kernel = Literal["torch", "liger"]
_chosen: Kernel = "torch"


def use(kernel: Kernel) -> None:
    """Let this process compute by `kernel` from now on; `why_not_liger` says whether it can. fp64 is left to torch."""
    global _chosen
    _chosen = kernel


def chosen() -> Kernel:
    """What `use` chose."""
    return _chosen


@contextmanager
def using(kernel: Kernel) -> Iterator[None]:
    """Compute by `kernel` in this block."""
    before = _chosen
    use(kernel)
    try:
        yield
    finally:
        use(before)


def is_installed() -> bool:
    """Is the package liger-kernel?"""
    return find_spec("liger_kernel") is not None


def why_not_liger(device: str) -> str | None:
    """What keeps Liger's kernel from this process's `device`, seen by trying it; None where it does as torch does."""
    if not is_installed():
        return "liger-kernel is not installed"
    logits = torch.linspace(-9, 9, 5 * 301, device=device).sin().mul(9).view(301, 5).T.contiguous()
    targets = torch.arange(0, 300, 60, device=device)
    wanted_gradient = logits.clone()
    wanted = _by_torch(wanted_gradient, targets)
    try:
        found = liger_log_probs(logits, targets, True)
    except Exception as error:  # another version's kernel, or Triton without a compiler or a device
        return f"liger-kernel cannot be used here: {type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
    if torch.allclose(found, wanted, atol=1e-4) and torch.allclose(logits, wanted_gradient, atol=1e-5):
        return None
    return "liger-kernel computes something else than PyTorch"


def log_probs(logits: Tensor, targets: Tensor) -> Tensor:
    """[targets] log-probabilities, fp32, or fp64 of fp64 logits; logits [targets, vocabulary] may be overwritten."""
    if _by_liger(logits):
        return liger_log_probs(logits, targets, False)  # type: ignore[no-any-return]
    logits = logits.to(at_least_fp32(logits.dtype))
    torch.log_softmax(logits, dim=-1, out=logits)
    return logits.gather(1, targets[:, None]).squeeze(1)


def log_probs_and_gradient(logits: Tensor, targets: Tensor) -> Tensor:
    """The same, and `logits` become the gradient of each by its logits, negated: softmax less one-hot, in their type.

    The one is subtracted before the gradient is rounded: of a target that is nearly certain, bf16 would leave nothing.
    """
    return liger_log_probs(logits, targets, True) if _by_liger(logits) else _by_torch(logits, targets)


def at_least_fp32(dtype: torch.dtype) -> torch.dtype:
    """The precision of log-probabilities: that of the logits, and fp32 for a lower one."""
    return torch.promote_types(dtype, torch.float32)


def _by_liger(logits: Tensor) -> bool:
    return _chosen == "liger" and logits.dtype != torch.float64


def _by_torch(logits: Tensor, targets: Tensor) -> Tensor:
    """One softmax in place and two maxima cost half of a log-softmax that is then exponentiated: the logarithm of the
    softmax's sum is that of the largest probability, negated."""
    exact = logits.to(at_least_fp32(logits.dtype))
    of_targets = torch.arange(len(targets), device=targets.device), targets
    found = exact[of_targets] - exact.amax(1)
    torch.softmax(exact, dim=-1, out=exact)
    found += exact.amax(1).log_()
    exact[of_targets] -= 1
    if exact is not logits:
        logits.copy_(exact)
    return found


@torch.library.custom_op("llmtrain::liger_log_probs", mutates_args=("logits",))
def liger_log_probs(logits: Tensor, targets: Tensor, with_gradient: bool) -> Tensor:
    """[targets] log-probabilities, fp32; with gradient, `logits` [targets, vocabulary] become softmax less one-hot.

    An operator of its own, so that a plan sees it without Liger and without a GPU.
    """
    losses = torch.empty(len(logits), dtype=torch.float32, device=logits.device)
    if not len(logits):
        return losses
    from liger_kernel.ops.cross_entropy import MAX_FUSED_SIZE, liger_cross_entropy_kernel

    rows, columns = logits.shape
    liger_cross_entropy_kernel[(rows,)](
        X_ptr=logits,
        X_stride=logits.stride(0),
        Y_ptr=targets,
        Y_stride=targets.stride(0),
        loss_ptr=losses,
        loss_stride=1,
        n_cols=columns,
        BLOCK_SIZE=min(MAX_FUSED_SIZE, 1 << (columns - 1).bit_length()),
        HAS_GRADIENTS=with_gradient,
        num_warps=32,  # as Liger chooses on Hopper and before it
        # no mean, and no target ignored:
        reduction="none",
        n_non_ignore=rows,
        sum_non_ignore_weight=rows,
        ignore_index=-100,
        # what else Liger could do:
        weight_ptr=None,
        weight_sum=0.0,
        HAS_WEIGHT=False,
        label_smoothing=0.0,
        lse_square_scale=0.0,
        z_loss_ptr=None,
        RETURN_Z_LOSS=False,
        softcap=None,
        HAS_SOFTCAPPING=False,
        token_accuracy_ptr=None,
        token_accuracy_stride=0,
        RETURN_TOKEN_ACCURACY=False,
        predicted_tokens_ptr=None,
        predicted_tokens_stride=0,
        RETURN_PREDICTED_TOKENS=False,
    )
    return losses.neg_()


@liger_log_probs.register_fake
def _(logits: Tensor, targets: Tensor, with_gradient: bool) -> Tensor:
    return logits.new_empty(len(logits), dtype=torch.float32)
