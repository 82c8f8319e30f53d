"""deepspeed_zero2 and deepspeed_zero3: DeepSpeed shares out gradients and optimizer, and in stage 3 the weights."""

import io
import logging
import os
from collections import defaultdict
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer
from transformers import PreTrainedModel

from llmtrain.config.infra import Infra
from llmtrain.errors import UserError
from llmtrain.training.ranks import resharding
from llmtrain.training.ranks.alone import Arguments, Around, Result, write_state
from llmtrain.training.ranks.group import Ranks
from llmtrain.training.ranks.resharding import MODULE_PREFIX

TAG = "zero"
BUCKET = 200_000_000
"""Numbers that are sent at once, at most: the memory for them is taken at the start."""


class ZeRO(Ranks):
    """DeepSpeed's engine (arXiv 1910.02054) around the network, in fp32; autocast is ours."""

    def __init__(self, infra: Infra, stage: int, directory: Path) -> None:
        super().__init__(infra)
        _compile_in(directory / "torch_extensions")
        self.stage, self.splits_weights = stage, stage == 3
        self.deepspeed = _deepspeed(infra)
        self.engine: Any = None
        self._to_restore: Path | None = None

    def prepare(self, optimizer: Optimizer, max_grad_norm: float) -> Optimizer:
        super().prepare(optimizer, max_grad_norm)
        around = Around(self.model)
        if self.stage == 3:  # used outside its own module's forward pass
            self.deepspeed.zero.register_external_parameter(around, self.model.get_output_embeddings().weight)
        bucket = min(BUCKET, sum(parameter.numel() for parameter in self.model.parameters()))
        zero: dict[str, Any] = {
            "stage": self.stage,
            "overlap_comm": self.infra.accelerator == "cuda",
            "reduce_bucket_size": bucket,
            "allgather_bucket_size": bucket,
        }
        if self.infra.offload:
            zero["offload_optimizer"] = {"device": "cpu"}
            if self.stage == 3:
                zero["offload_param"] = {"device": "cpu"}
        config = {
            "train_micro_batch_size_per_gpu": 1,  # not used: the loss is normalised by us
            "gradient_accumulation_steps": 1,  # the boundary is told at each micro-batch
            "gradient_clipping": max_grad_norm,
            "zero_optimization": zero,
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,  # torch's fused AdamW is a CPU's too
        }
        with redirect_stdout(io.StringIO()):  # it prints what it compiles
            self.engine, *_ = self.deepspeed.initialize(
                model=around, optimizer=optimizer, config=config, dist_init_required=False
            )
        return _Rates(optimizer)

    def compute(
        self, function: Callable[Arguments, Result], *args: Arguments.args, **kwargs: Arguments.kwargs
    ) -> Result:
        if self.engine is None:
            return function(*args, **kwargs)
        found: dict[str, Result] = self.engine.module(lambda: {"found": function(*args, **kwargs)})
        return found["found"]  # in a dictionary, because stage 3 looks for tensors in what a module returns

    def backward(self, loss: Callable[[], Tensor], last: bool) -> Tensor:
        self.engine.set_gradient_accumulation_boundary(last)
        found: Tensor = self.engine(loss)
        self.engine.backward(found * self.size)  # DeepSpeed takes the mean over ranks
        return found.detach()

    def clip(self) -> Tensor:
        """Clips and updates at once: DeepSpeed has no seam between the two."""
        self.engine.step()
        return torch.as_tensor(self.engine.get_global_grad_norm(), dtype=torch.float32)

    def update(self) -> None:
        pass

    def whole(self) -> PreTrainedModel | None:
        if self.stage == 2:
            return self.model if self.rank == 0 else None
        state: dict[str, Tensor] = {}
        for module_name, module in self.model.named_modules():
            own = dict(module.named_parameters(recurse=False, remove_duplicate=False))
            with self.deepspeed.zero.GatheredParameters(list(own.values())):
                for name, parameter in own.items() if self.rank == 0 else ():
                    state[f"{module_name}.{name}".removeprefix(".")] = parameter.detach().cpu().clone()
        return resharding.plain_copy(self.model, state) if self.rank == 0 else None

    def save(self, checkpoint: dict[str, Any], directory: Path) -> None:
        with redirect_stdout(io.StringIO()):
            self.engine.save_checkpoint(str(directory), tag=TAG, save_latest=False)
        rest = {name: value for name, value in checkpoint.items() if name not in ("state_dict", "optimizer_states")}
        if self.rank == 0:
            write_state(rest | {"zero": {"strategy": self.infra.strategy, "ranks": self.size}}, directory)

    def load(self, directory: Path) -> dict[str, Any]:
        state: dict[str, Any] = torch.load(directory / "state.pt", map_location="cpu", weights_only=True)
        ours = {"strategy": self.infra.strategy, "ranks": self.size}
        if (theirs := state.pop("zero", None)) != ours:
            raise UserError(
                f"{directory} was written by "
                + (f"infra.strategy={theirs['strategy']} on {theirs['ranks']} ranks" if theirs else "another strategy")
                + f", which {self.infra.strategy} on {self.size} ranks cannot read: set "
                + (f"infra.strategy={theirs['strategy']} infra.ranks={theirs['ranks']}" if theirs else
                   "infra.strategy=ddp or fsdp2")
                + ", or start anew with --again"
            )  # fmt: skip
        self._to_restore = directory
        as_it_is = {f"{MODULE_PREFIX}{name}": tensor for name, tensor in self.model.state_dict().items()}
        return state | {"state_dict": as_it_is, "optimizer_states": []}  # `restore` puts the saved ones in their place

    def restore(self) -> None:
        if self._to_restore is not None:
            self.engine.load_checkpoint(str(self._to_restore), tag=TAG)
            self._to_restore = None


class _Rates(Optimizer):
    """The groups of an optimizer, to set their learning rates; its state is in DeepSpeed's hands."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer
        self.state, self.defaults = defaultdict(dict), {}

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        """Those of now: loading a checkpoint makes new ones."""
        return self.optimizer.param_groups

    def state_dict(self) -> dict[str, Any]:
        return {}


def _deepspeed(infra: Infra) -> Any:
    """The package, quiet. Raises UserError where it is not installed."""
    try:
        import deepspeed
    except ImportError as error:
        raise UserError(
            f"infra.strategy={infra.strategy} needs DeepSpeed ({error}): pip install 'llmtrain[deepspeed]', "
            f"or set infra.strategy=fsdp2"
        ) from error
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # Its own reductions for CPUs take a minute to compile, and hang where a core lacks AVX-512; gloo's serve.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def _compile_in(directory: Path) -> None:
    """Let DeepSpeed compile its kernels in a directory of this run, without the lock of a process that was killed.

    A lock left behind in the shared cache makes every later run wait for ever, without a word.
    """
    os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(directory))
    if dist.get_rank() == 0:
        for lock in directory.rglob("lock"):
            lock.unlink()
    dist.barrier()
