"""What a training step asks of the way ranks share the work, and the answer of a single process."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_
from torch.optim import Optimizer
from transformers import PreTrainedModel

from llmtrain.files import whole_directory

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


class Alone:
    """One process. The strategies of many ranks inherit from it, and say what is different with them.

    The order of calls: `shard` when the model is built, `prepare` when it has an optimizer; then, for each step, one
    `backward` for each micro-batch, `clip`, `update`; `compute` around whatever else looks at the network.
    """

    rank, size = 0, 1
    data_rank, data_ranks = 0, 1
    """Which share of a step's micro-batches this rank computes, of how many shares."""
    splits_weights = False
    """Does looking at the network take all ranks?"""

    def __init__(self) -> None:
        self.model: PreTrainedModel

    # ---- the network

    def shard(self, model: PreTrainedModel) -> None:
        """Take `model`, on the device and equal on all ranks; after it, a parameter may be this rank's part."""
        self.model = model

    def prepare(self, optimizer: Optimizer, max_grad_norm: float) -> Optimizer:
        """Take the optimizer of the model's parameters, its state still empty; returns the one to set `lr` of, and
        whose state Lightning puts into a checkpoint."""
        self.optimizer, self.max_grad_norm = optimizer, max_grad_norm
        return optimizer

    def compute(
        self, function: Callable[Arguments, Result], *args: Arguments.args, **kwargs: Arguments.kwargs
    ) -> Result:
        """`function(*args, **kwargs)`, in which the network's weights can be used as if they were whole."""
        return function(*args, **kwargs)

    def whole(self) -> PreTrainedModel | None:
        """The network with all its weights as plain tensors, on rank 0; None on the others. All ranks call it."""
        return self.model

    # ---- a step

    def backward(self, loss: Callable[[], Tensor], last: bool) -> Tensor:
        """Add the gradient of `loss()` to what is there; `last` tells that the step's gradient is then complete.

        Returns the loss, detached. Gradients of ranks add up: a loss is a share of the step's.
        """
        found = loss()
        found.backward()  # type: ignore[no-untyped-call]
        return found.detach()

    def clip(self) -> Tensor:
        """Clip the step's gradient to `max_grad_norm`; returns its norm before, over all ranks."""
        return clip_grad_norm_(self.model.parameters(), self.max_grad_norm)

    def update(self) -> None:
        """Let the optimizer take its step, and forget the gradient."""
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def total(self, values: Tensor) -> Tensor:
        """The sum, element by element, over the ranks that compute different shares."""
        return values

    # ---- agreement

    def same(self, value: Result) -> Result:
        """Rank 0's `value`, on all ranks."""
        return value

    def largest(self, value: int) -> int:
        """The largest `value` of all ranks, on all ranks."""
        return value

    def gathered(self, value: Result) -> list[Result]:
        """The `value` of each rank, on all ranks."""
        return [value]

    def gathered_shares(self, tensor: Tensor) -> list[Tensor]:
        """`tensor` of each of the ranks that compute different shares, on all ranks."""
        return [tensor]

    @contextmanager
    def first_alone(self) -> Iterator[None]:
        """Rank 0 does the block, then the others, who find what it has written."""
        yield

    def looking(self, figures: Callable[[], Result]) -> Result:
        """Rank 0's `figures()`, on all ranks; computed by all only where that takes all."""
        return self.compute(figures)

    # ---- checkpoints

    @contextmanager
    def whole_directory(self, target: Path) -> Iterator[Path]:
        """`files.whole_directory`, filled by all ranks together; each must come to its end."""
        with whole_directory(target) as directory:
            yield directory

    def save(self, checkpoint: dict[str, Any], directory: Path) -> None:
        """Write the state of this process to `state.pt`."""
        write_state(checkpoint, directory)

    def load(self, directory: Path) -> dict[str, Any]:
        """What `save` was given, in the form that this strategy's model and optimizer take."""
        from llmtrain.training.ranks.resharding import read_whole

        return read_whole(directory)

    def restore(self) -> None:
        """Finish what `load` could not do before there was an optimizer."""

    def leave(self) -> None:
        """Part from the other ranks."""


def write_state(checkpoint: dict[str, Any], directory: Path) -> None:
    with (directory / "state.pt").open("wb") as file:
        try:
            torch.save(checkpoint, file)
        except RuntimeError as error:  # torch's, about the end of an archive that a full disk cut short
            raise error.__context__ or error from None


class Around(nn.Module):
    """A module whose forward pass is any computation with `model`: what wrappers of many ranks hook into."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)
