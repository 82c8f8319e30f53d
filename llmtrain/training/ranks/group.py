"""Joining the other ranks, and what all strategies of more than one share."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import PreTrainedModel

from llmtrain.config.infra import Infra
from llmtrain.errors import UserError
from llmtrain.files import whole_directory
from llmtrain.training.ranks.alone import Alone, Result, write_state

TIMEOUT = timedelta(hours=2)
"""Longest wait for another rank that lives: rank 0 may evaluate or hash alone. One that has died is noticed at once."""


class Ranks(Alone):
    """Processes that have joined: sums and agreement over all of them."""

    def __init__(self, infra: Infra) -> None:
        super().__init__()
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self.data_rank, self.data_ranks = self.rank, self.size
        self.infra = infra

    def whole(self) -> PreTrainedModel | None:
        return self.model if self.rank == 0 else None

    def total(self, values: Tensor) -> Tensor:
        values = values.to(self.infra.accelerator)
        dist.all_reduce(values)
        return values

    def same(self, value: Result) -> Result:
        box = [value]
        dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
        return box[0]

    def largest(self, value: int) -> int:
        found = torch.tensor(value)  # on the CPU: no wait for the device
        dist.all_reduce(found, op=dist.ReduceOp.MAX)
        return int(found.item())

    def gathered(self, value: Result) -> list[Result]:
        boxes: list[Any] = [None] * self.size
        dist.all_gather_object(boxes, value)
        return boxes

    def gathered_shares(self, tensor: Tensor) -> list[Tensor]:
        return [part.to(tensor.device) for part in self.gathered(tensor.cpu())]

    @contextmanager
    def first_alone(self) -> Iterator[None]:
        if self.rank:
            dist.barrier()
        yield
        if self.rank == 0:
            dist.barrier()

    def looking(self, figures: Callable[[], Result]) -> Result:
        if self.splits_weights:
            return self.same(self.compute(figures))
        box = [figures() if self.rank == 0 else None]
        found: Result = self.same(box)[0]  # type: ignore[assignment]  # None on other ranks only before
        return found

    @contextmanager
    def whole_directory(self, target: Path) -> Iterator[Path]:
        target = self.same(target)
        aside = target.with_name(f"{target.name}.writing")
        with whole_directory(target) if self.rank == 0 else nullcontext(aside):
            dist.barrier()  # the directory is there
            yield aside
            dist.barrier()  # all have written
        dist.barrier()  # it has its name

    def save(self, checkpoint: dict[str, Any], directory: Path) -> None:
        if self.rank == 0:
            write_state(checkpoint, directory)

    def leave(self) -> None:
        dist.destroy_process_group()


def join(infra: Infra) -> None:
    """Meet the other ranks where the environment says (RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT: torchrun
    sets them, as srun and Ray can), one device for each rank of a machine.

    Raises UserError where they are not as many as the run was frozen for.
    """
    if dist.is_initialized():
        return
    size = int(os.environ["WORLD_SIZE"])
    if size != infra.ranks:
        raise UserError(f"{size} ranks were started, but the run has infra.ranks={infra.ranks}: start as many")
    if infra.accelerator == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("cpu:gloo,cuda:nccl", timeout=TIMEOUT)
    else:
        dist.init_process_group("gloo", timeout=TIMEOUT)


def strategy_of(infra: Infra, directory: Path) -> Alone:
    """How the ranks that have joined share the work of the run in `directory`; `Alone` where there is one.

    Raises UserError where a package is missing.
    """
    if infra.ranks == 1:
        return Alone()
    from llmtrain.training.ranks import replicated, sharded, zero

    match infra.strategy:
        case "ddp":
            return replicated.DDP(infra)
        case "fsdp2":
            return sharded.FSDP2(infra)
        case "tensor_parallel":
            return sharded.TensorParallel(infra)
        case "deepspeed_zero2":
            return zero.ZeRO(infra, 2, directory)
        case "deepspeed_zero3":
            return zero.ZeRO(infra, 3, directory)
