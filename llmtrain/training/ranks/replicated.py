"""ddp: every rank has the whole model, and gradients are summed while the last backward pass is under way."""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from llmtrain.training.ranks.alone import Around
from llmtrain.training.ranks.group import Ranks


class DDP(Ranks):
    """torch's DistributedDataParallel with a sum in place of its mean."""

    def prepare(self, optimizer: Optimizer, max_grad_norm: float) -> Optimizer:
        device_ids = [torch.cuda.current_device()] if self.infra.accelerator == "cuda" else None
        self.around = DistributedDataParallel(Around(self.model), device_ids=device_ids, forward_sync_buffers=False)
        self.around.register_comm_hook(None, _sum)
        return super().prepare(optimizer, max_grad_norm)

    def backward(self, loss: Callable[[], Tensor], last: bool) -> Tensor:
        self.around.require_backward_grad_sync = last
        found: Tensor = self.around(loss)
        found.backward()  # type: ignore[no-untyped-call]
        return found.detach()


def _sum(_: None, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:  # type: ignore[name-defined]
    work: Any = dist.all_reduce(bucket.buffer(), async_op=True)
    summed: torch.futures.Future[Tensor] = work.get_future().then(lambda future: future.value()[0])
    return summed
