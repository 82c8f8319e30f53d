"""The optimizers: AdamW, Muon with AdamW beside it, and AdamW with moments of eight bits."""

from collections.abc import Callable, Iterable
from math import sqrt
from typing import Any, Literal

import torch
from torch import Tensor, nn, optim
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import PreTrainedModel

from llmtrain.config.trainer import Trainer
from llmtrain.errors import UserError

Groups = list[dict[str, Any]]


def optimizer_of(model: PreTrainedModel, trainer: Trainer, accelerator: Literal["cpu", "cuda"]) -> optim.Optimizer:
    """The optimizer that `trainer.optimizer` names, over the parameters of `model` that require a gradient.

    One object; `lr` is set in each of its `param_groups`. Weight decay is for matrices and embeddings, not for vectors
    (norms, biases). Parameters may be sharded (DTensor), except for adamw_8bit. Raises UserError where the optimizer
    cannot serve this accelerator or these parameters.
    """
    match trainer.optimizer:
        case "adamw":
            return adamw(model, trainer)
        case "muon":
            return muon(model, trainer)
        case "adamw_8bit":
            return adamw_8bit(model, trainer, accelerator)


def adamw(model: nn.Module, trainer: Trainer) -> optim.AdamW:
    """AdamW (arXiv 1711.05101); weight decay on matrices and embeddings, none on vectors (norms)."""
    return optim.AdamW(_groups(_trained(model), trainer), **_adam_settings(trainer), fused=True)


def adamw_8bit(model: nn.Module, trainer: Trainer, accelerator: Literal["cpu", "cuda"]) -> optim.Optimizer:
    """AdamW whose two moments take a byte each, quantised in blocks (arXiv 2110.02861), by bitsandbytes.

    Tensors of fewer than 4,096 entries keep fp32 moments. Raises UserError on a CPU, without the package, or where
    parameters are sharded.
    """
    if accelerator != "cuda":
        raise UserError(
            f"trainer.optimizer=adamw_8bit needs CUDA, and this run has infra.accelerator={accelerator}: "
            f"set trainer.optimizer=adamw, or choose infra=local_gpu"
        )
    if any(isinstance(parameter, DTensor) for parameter in _trained(model)):
        raise UserError(
            "trainer.optimizer=adamw_8bit cannot update sharded parameters: "
            "set trainer.optimizer=adamw, or infra.strategy=ddp"
        )
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError as error:
        raise UserError(
            f"trainer.optimizer=adamw_8bit needs the package bitsandbytes ({error}): "
            f"pip install bitsandbytes, or set trainer.optimizer=adamw"
        ) from error
    found: optim.Optimizer = AdamW8bit(_groups(_trained(model), trainer), **_adam_settings(trainer))
    return found


def muon(model: PreTrainedModel, trainer: Trainer) -> "MuonWithAdamW":
    """Muon for the matrices inside the blocks, AdamW for embeddings, output layer, vectors and stacked experts.

    An adapter's matrices are low-rank factors, whose product is what should be orthogonal and not each of them: with
    no other matrix to train, this raises UserError.
    """
    outside = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    outside |= {id(parameter) for parameter in model.get_output_embeddings().parameters()}
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    matrices = [p for name, p in named if p.ndim == 2 and id(p) not in outside and "lora_" not in name]
    if not matrices:
        raise UserError(
            "trainer.optimizer=muon finds no matrix to train inside the blocks (an adapter's factors are not for it): "
            "set trainer.optimizer=adamw, or adapter=none"
        )
    chosen = {id(parameter) for parameter in matrices}
    return MuonWithAdamW(matrices, [parameter for _, parameter in named if id(parameter) not in chosen], trainer)


class MuonWithAdamW(optim.Optimizer):
    """Muon (https://kellerjordan.github.io/posts/muon) and AdamW as one: group 0 is Muon's, the others are AdamW's.

    Muon's step has the size of AdamW's (0.2 * sqrt of the longer side: arXiv 2502.16982, equation 4), so that one `lr`
    and one weight decay serve both. The same as `torch.optim.Muon` with `adjust_lr_fn="match_rms_adamw"`, except that
    a CPU orthogonalises in fp32 (torch: bf16 everywhere, which many CPUs emulate, and which turns the rounding of
    another number of ranks into half a percent of a step), and that each rank gathers a sharded matrix and
    orthogonalises it whole.
    """

    def __init__(self, matrices: Iterable[Tensor], others: Iterable[Tensor], trainer: Trainer) -> None:
        self.adamw = optim.AdamW(_groups(list(others), trainer), **_adam_settings(trainer), fused=True)
        ours = {
            "params": list(matrices),
            "lr": trainer.lr,
            "momentum": trainer.muon_momentum,
            "weight_decay": trainer.weight_decay,
        }
        super().__init__([ours, *self.adamw.param_groups], defaults={})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        group, *others = self.param_groups
        for parameter in group["params"]:
            if parameter.grad is not None:
                self._update(parameter, group["lr"], group["momentum"], group["weight_decay"])
        self.adamw.param_groups, self.adamw.state = others, self.state  # loading a state puts new ones into ours
        self.adamw.step()
        return loss

    def _update(self, parameter: Tensor, lr: float, momentum: float, weight_decay: float) -> None:
        gradient, state = parameter.grad, self.state[parameter]
        assert gradient is not None
        if not state:
            state["momentum_buffer"] = torch.zeros_like(gradient)
        mean = state["momentum_buffer"].lerp_(gradient, 1 - momentum)
        direction = gradient.lerp(mean, momentum)  # Nesterov's
        if isinstance(direction, DTensor):
            whole = orthogonal(direction.full_tensor())  # equal on all ranks
            update: Tensor = distribute_tensor(whole, direction.device_mesh, direction.placements, src_data_rank=None)
        else:
            update = orthogonal(direction)
        parameter.mul_(1 - lr * weight_decay)
        parameter.add_(update.to(parameter.dtype), alpha=-lr * 0.2 * sqrt(max(parameter.shape)))


def orthogonal(matrix: Tensor) -> Tensor:
    """About U V^T of matrix = U S V^T: five Newton-Schulz iterations put the singular values into 0.68 to 1.21.

    [rows, columns], in bf16 on CUDA and in fp32 or fp64 elsewhere. Those below 0.002 of the Frobenius norm stay lower.
    The coefficients are those of https://kellerjordan.github.io/posts/muon.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    precision = torch.bfloat16 if matrix.is_cuda else torch.promote_types(matrix.dtype, torch.float32)
    wide = matrix.mT if matrix.shape[0] > matrix.shape[1] else matrix
    x = wide.to(precision)
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if wide is not matrix else x


def _trained(model: nn.Module) -> list[Tensor]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def _groups(parameters: list[Tensor], trainer: Trainer) -> Groups:
    return [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": trainer.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]


def _adam_settings(trainer: Trainer) -> dict[str, Any]:
    return {"lr": trainer.lr, "betas": (trainer.adam_beta1, trainer.adam_beta2), "eps": trainer.adam_eps}
