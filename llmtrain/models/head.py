"""From selected hidden states to a loss and its gradients, in one pass over chunks of tokens.

The [tokens, vocabulary] tensor of logits never exists: a chunk's logits become their gradient in place
(llmtrain.models.logit_kernels), and that is multiplied out at once: three matrix products a token, as with all logits
kept (cf. Liger's fused linear cross-entropy, arXiv 2410.10989; cut cross-entropy, arXiv 2411.09009, keeps no logits and
multiplies four times). What is new here: the loss may be any function of sums over groups of tokens (the answers of a
preference pair), as long as a group's tokens fit a chunk; a longer group is passed over twice.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from llmtrain.models.logit_kernels import at_least_fp32, log_probs_and_gradient
from llmtrain.models.logprobs import as_autocast, equal_parts, filled_up, logits_memory, rows_filled_up

LossOfSums = Callable[[Tensor, slice], Tensor]
"""(log-probability sums of some owners [owners], which owners they are) -> the sum of their losses, a scalar."""
LossOfLogits = Callable[[Tensor, slice], Tensor]
"""(logits of some targets [targets, vocabulary], which targets they are) -> the sum of their losses, a scalar."""


@dataclass(frozen=True)
class Chunk:
    """Targets that are computed together, and the whole groups of owners that they make up."""

    targets: slice
    owners: slice


def chunks_of(counts: Sequence[int], group: int, chunk_tokens: int) -> list[Chunk]:
    """Whole groups of `group` owners, together at most `chunk_tokens` targets, or one group.

    `counts` are the targets of each owner, whose targets follow each other.
    """
    found: list[Chunk] = []
    first_target = first_owner = target = 0
    for owner in range(0, len(counts), group):
        size = sum(counts[owner : owner + group])
        if owner > first_owner and target + size - first_target > chunk_tokens:
            found.append(Chunk(slice(first_target, target), slice(first_owner, owner)))
            first_target, first_owner = target, owner
        target += size
    return [*found, Chunk(slice(first_target, target), slice(first_owner, len(counts)))] if counts else []


def loss_of_sums(
    hidden: Tensor, weight: Tensor, targets: Tensor, owners: Tensor, chunks: Sequence[Chunk], loss: LossOfSums,
    chunk_tokens: int,
) -> Tensor:  # fmt: skip
    """Sum of `loss` over all chunks, where each target's log-probability counts towards its owner's sum.

    hidden [targets, width], weight [vocabulary, width], targets and owners [targets]. Differentiable once, in `hidden`
    and `weight`; what `loss` itself holds is constant.
    """
    return _LossOfSums.apply(hidden, weight, targets, owners, chunks, loss, chunk_tokens)  # type: ignore[no-any-return, no-untyped-call]


def loss_of_tokens(hidden: Tensor, weight: Tensor, targets: Tensor, scale: float, chunk_tokens: int) -> Tensor:
    """`-scale * sum of log p(target)`: cross-entropy, whose gradient needs nothing but the token itself."""
    parts = equal_parts(slice(0, len(targets)), chunk_tokens)
    chunks = [Chunk(part, slice(number, number + 1)) for number, part in enumerate(parts)]
    owners = torch.empty_like(targets)
    for chunk in chunks:
        owners[chunk.targets] = chunk.owners.start
    return loss_of_sums(hidden, weight, targets, owners, chunks, lambda sums, _: -scale * sums.sum(), chunk_tokens)


def loss_of_logits(hidden: Tensor, weight: Tensor, loss: LossOfLogits, chunk_tokens: int) -> Tensor:
    """Sum of `loss` over chunks of logits, for losses that need whole distributions (distillation).

    hidden [targets, width], weight [vocabulary, width]. Differentiable once, in both.
    """
    return _LossOfLogits.apply(hidden, weight, loss, chunk_tokens)  # type: ignore[no-any-return, no-untyped-call]


class _Gradients:
    """Sums a chunk's contributions to the gradients of `hidden` and `weight`, only those that are needed."""

    def __init__(self, ctx: Any, hidden: Tensor, weight: Tensor) -> None:
        for_hidden, for_weight = ctx.needs_input_grad[:2]
        self.hidden = torch.empty_like(hidden) if for_hidden else None
        unwritten = torch.empty_like if len(hidden) else torch.zeros_like
        self.weight = unwritten(weight) if for_weight else None
        self.is_empty = True  # the first product is written, the others are added to it

    @property
    def needed(self) -> bool:
        return self.hidden is not None or self.weight is not None

    def add(self, where: slice, of_logits: Tensor, hidden: Tensor, weight: Tensor) -> None:
        """of_logits [targets, vocabulary]; hidden [targets, width]; weight [vocabulary, width], in hidden's type."""
        of_logits = of_logits.to(hidden.dtype)
        if self.hidden is not None:
            torch.mm(of_logits, weight, out=self.hidden[where])
        if self.weight is not None:
            self._add_to_weight(of_logits.T, hidden)

    def add_rows(self, where: slice, of_logits: Tensor, scale: Tensor, hidden: Tensor, weight: Tensor) -> None:
        """The same for `scale * of_logits`, one factor a target, without writing that down; of_logits [rows,
        vocabulary] and hidden [rows, width] may have more rows than there are targets, of zeros."""
        factors = scale.new_zeros(len(hidden), 1)  # at least fp32: what is scaled is rounded once
        factors[: len(scale), 0] = scale
        if self.hidden is not None:
            of_hidden = self.hidden[where]
            if len(of_hidden) == len(of_logits):
                torch.mm(of_logits, weight, out=of_hidden).mul_(factors)
            else:
                of_hidden.copy_((torch.mm(of_logits, weight) * factors)[: len(of_hidden)])
        if self.weight is not None:
            self._add_to_weight(of_logits.T, (hidden * factors).to(hidden.dtype))

    def _add_to_weight(self, left: Tensor, right: Tensor) -> None:
        assert self.weight is not None
        beta = 0 if self.is_empty else 1
        if self.weight.dtype == right.dtype:
            torch.addmm(self.weight, left, right, beta=beta, out=self.weight)
        elif right.is_cuda and self.weight.dtype == torch.float32:  # added before it is rounded to bf16
            torch.addmm(self.weight, left, right, out_dtype=torch.float32, beta=beta, out=self.weight)
        elif self.is_empty:
            self.weight.copy_(left @ right)
        else:
            self.weight += left @ right
        self.is_empty = False


class _LossOfSums(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, owners: Tensor, chunks: Sequence[Chunk],
        loss: LossOfSums, chunk_tokens: int,
    ) -> Tensor:  # fmt: skip
        hidden, cast = as_autocast(hidden.detach(), weight.detach())
        gradients = _Gradients(ctx, hidden, weight)
        logits = _Logits(chunks, chunk_tokens, hidden, cast)
        total = hidden.new_zeros((), dtype=at_least_fp32(hidden.dtype))
        for chunk in chunks:
            parts = equal_parts(chunk.targets, chunk_tokens)  # several where a single group is longer than a chunk
            log_probs = torch.cat([logits.log_probs(part, targets) for part in parts])
            value, upstream = _loss_and_gradient(log_probs, owners[chunk.targets] - chunk.owners.start, chunk, loss)
            total += value
            if not gradients.needed:
                continue
            for part, of_part in zip(parts, torch.split(upstream, [_size(part) for part in parts]), strict=True):
                if len(parts) > 1:
                    logits.log_probs(part, targets)
                gradients.add_rows(part, logits.of_rows, -of_part, logits.rows, cast)
        ctx.gradients = gradients
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        return (*_scaled(ctx, upstream), None, None, None, None, None)


class _LossOfLogits(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, loss: LossOfLogits, chunk_tokens: int) -> Tensor:
        hidden, cast = as_autocast(hidden.detach(), weight.detach())
        gradients = _Gradients(ctx, hidden, weight)
        total = hidden.new_zeros((), dtype=at_least_fp32(hidden.dtype))
        for part in equal_parts(slice(0, len(hidden)), chunk_tokens):
            with torch.enable_grad():
                logits = (hidden[part] @ cast.T).to(at_least_fp32(hidden.dtype)).requires_grad_(gradients.needed)
                value = loss(logits, part)
            total += value.detach()
            if gradients.needed:
                (of_logits,) = torch.autograd.grad(value, logits)
                gradients.add(part, of_logits, hidden[part], cast)
        ctx.gradients = gradients
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        return (*_scaled(ctx, upstream), None, None)


class _Logits:
    """One chunk's logits at a time, turned into their gradients, each in the memory of the one before."""

    def __init__(self, chunks: Sequence[Chunk], chunk_tokens: int, hidden: Tensor, weight: Tensor) -> None:
        self.hidden, self.weight = hidden, weight
        most = max([0, *(_size(part) for chunk in chunks for part in equal_parts(chunk.targets, chunk_tokens))])
        self.memory = logits_memory(hidden, rows_filled_up(most, hidden), len(weight))
        self.rows, self.of_rows = hidden, self.memory

    def log_probs(self, where: slice, targets: Tensor) -> Tensor:
        """[targets] log-probabilities. `rows` [rows, width] are then their hidden states and `of_rows` [rows,
        vocabulary] the gradients by their logits, negated: as many as targets, or some more of zeros."""
        self.rows = filled_up(self.hidden[where])
        self.of_rows = torch.mm(self.rows, self.weight.T, out=self.memory[: len(self.rows)])
        return log_probs_and_gradient(self.of_rows[: _size(where)], targets[where])


def _loss_and_gradient(log_probs: Tensor, owners: Tensor, chunk: Chunk, loss: LossOfSums) -> tuple[Tensor, Tensor]:
    """(the chunk's loss, [targets] its derivative by each log-probability)."""
    sums = log_probs.new_zeros(chunk.owners.stop - chunk.owners.start).index_add(0, owners, log_probs)
    with torch.enable_grad():
        sums.requires_grad_()
        value = loss(sums, chunk.owners)
    (of_sums,) = torch.autograd.grad(value, sums)
    return value.detach(), of_sums[owners]


def _scaled(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, Tensor | None]:
    found = ctx.gradients
    del ctx.gradients  # the weight's gradient is as large as the weight: let autograd keep it and not a copy
    if upstream.device.type == "cpu" and upstream.item() == 1:
        return found.hidden, found.weight
    return tuple(None if t is None else t.mul_(upstream) for t in (found.hidden, found.weight))  # type: ignore[return-value]


def _size(where: slice) -> int:
    return int(where.stop - where.start)
