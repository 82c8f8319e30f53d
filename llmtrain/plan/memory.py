"""What each rank holds under each strategy. The parts of one rank come from the traced step."""

from dataclasses import dataclass

from llmtrain.config.infra import Infra
from llmtrain.plan.step import StepTrace
from llmtrain.plan.trace import Part

DEEPSPEED_BUCKET = 500_000_000
"""Entries of DeepSpeed's buckets of gradients (`reduce_bucket_size`) and, at most, of gathered weights."""


@dataclass(frozen=True)
class Memory:
    """Bytes on one device, or of one CPU process."""

    parts: dict[Part, int]
    on_host: int
    """Bytes that offloading puts into the host's memory"""

    @property
    def total(self) -> int:
        return sum(self.parts.values())


def per_rank(step: StepTrace, infra: Infra, num_micro_batches: int) -> Memory:
    """Bytes by part at the fullest moment of a step on one rank.

    ddp: everything, and the buckets in which gradients travel. fsdp2: shares; whole are the weights outside the blocks,
    the block at work and the next, and the gradients of the block at work. ZeRO: shares of the optimizer, with an fp32
    copy of its weights, and of gradients; stage 3 of weights too (arXiv 1910.02054). tensor_parallel: the blocks'
    matrices are cut, activations are counted whole, which is more than they are.
    """
    peak = step.peak(num_micro_batches)
    ranks = infra.ranks
    if ranks == 1:
        return Memory(peak, 0)
    weights, gradients, optimizer = peak["weights"], step.gradients, step.optimizer
    trained = step.gradients
    workspace, on_host = peak["workspace"], 0
    match infra.strategy:
        case "ddp":
            workspace += gradients
        case "fsdp2":
            weights, gradients, optimizer = weights // ranks, gradients // ranks, optimizer // ranks
            workspace += 3 * step.blocks + step.outside_blocks
            if infra.offload:
                on_host = weights + gradients + optimizer
                weights = gradients = optimizer = 0
        case "deepspeed_zero2" | "deepspeed_zero3" as strategy:
            gradients, optimizer = gradients // ranks, (optimizer + trained) // ranks
            workspace += min(DEEPSPEED_BUCKET * 4, trained)
            if strategy == "deepspeed_zero3":
                workspace += min(DEEPSPEED_BUCKET * 8, weights)
                weights //= ranks
            if infra.offload:
                on_host = optimizer + gradients + (weights if strategy == "deepspeed_zero3" else 0)
                optimizer = 0
        case "tensor_parallel":
            cut = max(0, weights - step.outside_blocks) / max(1, weights)
            share = cut / ranks + 1 - cut
            weights, gradients, optimizer = (round(part * share) for part in (weights, gradients, optimizer))
    parts: dict[Part, int] = {
        "weights": weights,
        "gradients": gradients,
        "optimizer": optimizer,
        "activations": peak["activations"],
        "logits": peak["logits"],
        "workspace": workspace,
    }
    return Memory(parts, on_host)


def bytes_between_ranks(step: StepTrace, infra: Infra, num_micro_batches: int) -> float:
    """Bytes that a rank sends in one step, by ring algorithms: an all-reduce is 2 (n - 1) / n of the data, a gather or
    a scatter half of that."""
    ring = (infra.ranks - 1) / infra.ranks
    match infra.strategy:
        case _ if infra.ranks == 1:
            return 0.0
        case "ddp":
            return 2 * ring * step.gradients
        case "fsdp2" | "deepspeed_zero3":
            return ring * num_micro_batches * (2 * step.weights + step.gradients)
        case "deepspeed_zero2":
            return ring * (num_micro_batches * step.gradients + step.weights)
        case "tensor_parallel":
            per_token = 4 * 4 * step.row.num_tokens  # two all-reduces forward, two backward, fp32
            return 2 * ring * num_micro_batches * per_token * step.hidden_by_layers
