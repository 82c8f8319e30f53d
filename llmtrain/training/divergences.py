"""How far a student's distribution over the next token is from its teacher's, as pure functions of logits.

Logits are [n, vocabulary], one row a token; results are [n], in nats, in the precision of the student's logits. Both
distributions are softmax(logits / temperature), and the divergence is multiplied by temperature^2, so that its
gradient keeps its size (arXiv 1503.02531, section 2). No gradient reaches the teacher.

Of a teacher's distribution its k likeliest tokens may be kept, and the mass of all others together: `TopK`. Then both
distributions are taken over these k + 1 events. That is a divergence in its own right: never negative, at most the
one over the whole vocabulary, zero if and only if student and teacher agree on the k tokens; how the student spreads
the rest is free.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Direction = Literal["forward", "reverse"]


@dataclass(frozen=True)
class TopK:
    """What is kept of a teacher's distribution for n tokens, at one temperature (another one needs the logits)."""

    log_probs: Tensor
    """[n, k + 1]: of the k tokens, then of all others together; rounded to any precision"""
    ids: Tensor
    """[n, k] int64"""

    def __getitem__(self, where: slice) -> "TopK":
        """What is kept for some of the tokens."""
        return TopK(self.log_probs[where], self.ids[where])


def top_k(teacher_logits: Tensor, k: int, temperature: float) -> TopK:
    """The k likeliest tokens of softmax(teacher_logits / temperature), k less than the vocabulary, likeliest first."""
    scaled = teacher_logits.detach() / temperature
    return TopK(_coarse(scaled, ids := scaled.topk(k, dim=1).indices), ids)


def divergence(student_logits: Tensor, teacher: Tensor | TopK, temperature: float, direction: Direction) -> Tensor:
    """temperature^2 * KL(teacher || student) (`forward`) or KL(student || teacher) (`reverse`, arXiv 2306.08543): [n].

    `teacher` is its logits, or a `TopK` taken at the same temperature.
    """
    scaled = student_logits / temperature
    match teacher:
        case TopK():
            student = _coarse(scaled, teacher.ids)
            target = teacher.log_probs.to(scaled.dtype).log_softmax(dim=1)  # sums to one again after rounding
        case _:
            student = scaled.log_softmax(dim=1)
            target = (teacher.detach().to(scaled.dtype) / temperature).log_softmax(dim=1)
    match direction:
        case "forward":
            return temperature**2 * _kl(target, student)
        case "reverse":
            return temperature**2 * _kl(student, target)


def _kl(p: Tensor, q: Tensor) -> Tensor:
    """KL(p || q) of log-probabilities [n, events]; an event that p excludes costs nothing."""
    return (p.exp() * (p - q).masked_fill(p == -torch.inf, 0)).sum(dim=1)


def _coarse(logits: Tensor, ids: Tensor) -> Tensor:
    """[n, k + 1] log-probabilities of the tokens `ids`, and of all others together (their own sum: 1 - sum of the k
    would lose a small rest to rounding)."""
    rest = logits.scatter(1, ids, -torch.inf).logsumexp(dim=1, keepdim=True)
    events = torch.cat([logits.gather(1, ids), rest], dim=1)
    return events - logits.logsumexp(dim=1, keepdim=True)
