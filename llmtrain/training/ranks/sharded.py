"""fsdp2 and tensor_parallel: a parameter is a DTensor, of which each rank holds a part."""

import fnmatch
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.experimental import implicit_replication
from torch.nn.utils import get_total_norm
from torch.optim import Optimizer
from transformers import PreTrainedModel

from llmtrain.config.infra import Infra
from llmtrain.errors import UserError
from llmtrain.models.adapter import is_attached
from llmtrain.training.ranks import resharding
from llmtrain.training.ranks.alone import Arguments, Around, Result
from llmtrain.training.ranks.group import Ranks


class Sharded(Ranks):
    """What both have in common: norms, steps, checkpoints and whole weights of DTensors among plain tensors."""

    splits_weights = True

    def __init__(self, infra: Infra) -> None:
        super().__init__(infra)
        self.mesh = init_device_mesh(infra.accelerator, (self.size,))

    def prepare(self, optimizer: Optimizer, max_grad_norm: float) -> Optimizer:
        optimizer.register_load_state_dict_pre_hook(resharding.cut_optimizer_state)
        return super().prepare(optimizer, max_grad_norm)

    def clip(self) -> Tensor:
        """A replicated gradient counts once, a sharded one as the whole that its parts make up."""
        gradients = [parameter.grad for parameter in self.model.parameters() if parameter.grad is not None]
        parts = [gradient for gradient in gradients if isinstance(gradient, DTensor)]
        copies = [gradient for gradient in gradients if not isinstance(gradient, DTensor)]
        norms = [get_total_norm(some) for some in (parts, copies) if some]
        norm: Tensor = torch.stack([norm.full_tensor() if isinstance(norm, DTensor) else norm for norm in norms]).norm()
        scale = (self.max_grad_norm / (norm + 1e-6)).clamp(max=1.0)  # as torch.nn.utils.clip_grad_norm_
        for gradient in gradients:
            local = gradient.to_local() if isinstance(gradient, DTensor) else gradient
            local.mul_(scale.to(local.device))
        return norm

    def update(self) -> None:
        with implicit_replication():  # the optimizer's fused kernel takes DTensors and plain tensors together
            super().update()

    def whole(self) -> PreTrainedModel | None:
        state = {}
        for name, tensor in self.model.state_dict().items():
            full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
            if self.rank == 0:
                state[name] = full.cpu()
        return resharding.plain_copy(self.model, state) if self.rank == 0 else None

    def save(self, checkpoint: dict[str, Any], directory: Path) -> None:
        resharding.write_sharded(checkpoint, directory, self.model, self.optimizer, first=self.rank == 0)

    def load(self, directory: Path) -> dict[str, Any]:
        return resharding.read_sharded(directory, self.model)


class FSDP2(Sharded):
    """Fully sharded data parallel (torch's `fully_shard`): a decoder layer's weights are whole only while it runs."""

    def shard(self, model: PreTrainedModel) -> None:
        super().shard(model)
        self.around: Any = Around(model)
        offload = CPUOffloadPolicy() if self.infra.offload else OffloadPolicy()
        for layer in _decoder_layers(model):
            fully_shard(layer, mesh=self.mesh, offload_policy=offload)
        fully_shard(self.around, mesh=self.mesh, offload_policy=offload)
        for module in self.around.modules():
            if isinstance(module, FSDPModule):
                module.set_gradient_divide_factor(1.0)  # a sum, not a mean
                module.set_force_sum_reduction_for_comms(True)  # gloo has no other

    def compute(
        self, function: Callable[Arguments, Result], *args: Arguments.args, **kwargs: Arguments.kwargs
    ) -> Result:
        found: Result = self.around(function, *args, **kwargs)
        self.around.reshard()  # of itself only the backward pass does
        return found

    def backward(self, loss: Callable[[], Tensor], last: bool) -> Tensor:
        found: Tensor = self.around(loss)
        found.backward()  # type: ignore[no-untyped-call]
        return found.detach()


class TensorParallel(Sharded):
    """Each matrix of a decoder layer is cut, as the plan that transformers has for the architecture says.

    All ranks compute the whole step. Embeddings, norms and the output layer are copies.
    """

    def __init__(self, infra: Infra) -> None:
        super().__init__(infra)
        self.data_rank, self.data_ranks = 0, 1

    def total(self, values: Tensor) -> Tensor:
        return values

    def gathered_shares(self, tensor: Tensor) -> list[Tensor]:
        return [tensor]

    def shard(self, model: PreTrainedModel) -> None:
        super().shard(model)
        from transformers.integrations.tensor_parallel import apply_tensor_parallelism

        prefix = f"{model.base_model_prefix}."
        plan = {f"{prefix}{name}": style for name, style in (model.config.base_model_tp_plan or {}).items()}
        matrices = {name: style for name, style in plan.items() if style in ("colwise", "rowwise") and ".*." in name}
        if is_attached(model):
            raise UserError(
                "infra.strategy=tensor_parallel cuts no adapters; set infra.strategy=fsdp2, or adapter=none"
            )
        if not matrices:
            raise UserError(
                f"infra.strategy=tensor_parallel: transformers has no plan for {type(model).__name__}; "
                f"set infra.strategy=fsdp2"
            )
        for name in ("num_attention_heads", "num_key_value_heads", "intermediate_size"):
            if getattr(model.config, name) % self.size:
                raise UserError(
                    f"infra.strategy=tensor_parallel cannot cut {name}={getattr(model.config, name)} into "
                    f"infra.ranks={self.size} equal parts; choose a divisor, or set infra.strategy=fsdp2"
                )
        apply_tensor_parallelism(model, self.mesh, matrices)
        partial = [f"{name}.weight" for name, style in plan.items() if style == "replicated_with_grad_allreduce"]
        for name, parameter in model.named_parameters():
            if any(fnmatch.fnmatchcase(name, pattern) for pattern in partial):
                # transformers' own hook sums what has accumulated, which counts earlier micro-batches twice
                parameter.register_hook(self._summed)

    def _summed(self, gradient: Tensor) -> Tensor:
        gradient = gradient.clone()
        dist.all_reduce(gradient)
        return gradient


def _decoder_layers(model: PreTrainedModel) -> list[torch.nn.Module]:
    names = set(model._no_split_modules or ())
    layers = [module for module in model.modules() if type(module).__name__ in names]
    if not layers:
        raise UserError(f"infra.strategy=fsdp2: {type(model).__name__} does not say what its layers are; use ddp")
    return layers
