"""Floating-point operations of training, by hand: a matrix product of [m, k] and [k, n] is 2 m k n of them.

Two conventions are common and both are given: attention's causal mask counted (`half`: only pairs of tokens that see
each other) and not counted (`full`). Element-wise work is left out of both. PaLM's appendix B (arXiv 2204.02311) has
the second; FlashAttention-2 (arXiv 2307.08691, section 4.1) the first.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from llmtrain.plan.step import StepTrace
from llmtrain.plan.workload import Row


@dataclass(frozen=True)
class Flops:
    """Of some rows, under one convention."""

    forward: float
    backward: float
    recomputed: float
    """What activation checkpointing computes a second time: no model FLOPs, so that MFU leaves it out"""

    @property
    def of_model(self) -> float:
        return self.forward + self.backward


def flops(
    rows: Sequence[Row],
    step: StepTrace,
    convention: Literal["half", "full"],
    checkpointing: Literal["none", "selective", "full"],
) -> Flops:
    """Of one pass, forward and backward, over `rows`.

    A trained matrix costs as much again for the gradient of its input and for its own; a frozen one only the first.
    `selective` checkpointing keeps matrix products and attention: it repeats none of what is counted here.
    """
    tokens, targets = sum(row.num_tokens for row in rows), sum(row.num_targets for row in rows)
    seen = sum(row.half_seen if convention == "half" else row.full_seen for row in rows)
    linear = 2.0 * step.linear_weights * tokens
    frozen = 2.0 * step.frozen_linear_weights * tokens
    attention = 4.0 * step.attention_width * seen
    head = 2.0 * step.head_weights * targets
    return Flops(
        forward=linear + attention + head,
        backward=2 * linear - frozen + 2 * attention + (2 if step.head_is_trained else 1) * head,
        recomputed=linear + attention if checkpointing == "full" else 0.0,
    )
