"""Liger's kernel in Triton's interpreter, which runs it on a CPU: its differences from exact figures, as JSON.

A process of its own: TRITON_INTERPRET=1 has to be set before anything imports Triton.
"""

import json

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from llmtrain.models import logit_kernels
from llmtrain.models.head import chunks_of, loss_of_sums, loss_of_tokens
from llmtrain.models.logprobs import token_log_probs

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = [(1, 2), (3, 97), (17, 1_000), (5, 33_000), (2, 151_936)]
"""Targets, vocabulary; Liger's blocks have 32,768 columns."""
COUNTS = [3, 5, 1, 1, 2, 7, 0, 4]
"""Targets of each answer; two make a pair."""


def main() -> None:
    found = {"why_not": logit_kernels.why_not_liger("cpu")}
    for dtype in DTYPES:
        for rows, columns in SHAPES:
            found[f"{dtype} {rows} x {columns}"] = of_logits(dtype, rows, columns)
    for precision in ("fp32", "bf16"):
        for chunk_tokens in (1, 8, 1_000):
            found[f"losses {precision}, {chunk_tokens} at once"] = of_losses(precision, chunk_tokens)
    found["nothing"] = loss_of_tokens(torch.zeros(0, 8), torch.ones(50, 8), torch.zeros(0).long(), 1.0, 4).item()
    print(json.dumps(found))


def of_logits(dtype: torch.dtype, rows: int, columns: int) -> dict[str, float]:
    """The largest differences from what fp64 makes of the same logits: of log-probabilities, and relative ones of
    gradients, by a target's own logit (which is a difference from 1) and by all the others."""
    torch.manual_seed(rows * columns)
    logits, targets = (4 * torch.randn(rows, columns)).to(dtype), torch.randint(columns, (rows,))
    of_targets = torch.arange(rows), targets
    logits[0, targets[0]] = 7 + logits[0].float().logsumexp(0).to(dtype)  # nearly certain
    exact = logits.double().log_softmax(1)
    wanted = exact[of_targets]
    exact = exact.exp_()
    exact[of_targets] = torch.expm1(wanted)
    with logit_kernels.using("liger"):
        log_probs = logit_kernels.log_probs(logits, targets)
        again, gradient = logit_kernels.log_probs_and_gradient(logits, targets), logits
    assert again.dtype == torch.float32
    assert gradient.dtype == dtype
    differences = gradient.double() - exact
    own = differences[of_targets].abs() / exact[of_targets].abs().clamp(min=1e-5)
    differences[of_targets] = 0
    normal = exact.abs() > torch.finfo(dtype).tiny  # below it, fp16 has fewer digits
    return {
        "log_probs": (log_probs.double() - wanted).abs().max().item(),
        "with and without gradient": (log_probs - again).abs().max().item(),
        "by targets": own.max().item(),
        "by others": (differences / exact)[normal].abs().max().item(),
    }


def of_losses(precision: str, chunk_tokens: int) -> dict[str, float]:
    """Relative differences between the two kernels in losses and gradients; log-probabilities' largest difference."""
    torch.manual_seed(chunk_tokens)
    lengths = torch.tensor(COUNTS)
    owners = torch.arange(len(COUNTS)).repeat_interleave(lengths)
    hidden, weight = torch.randn(len(owners), 16).requires_grad_(), torch.randn(97, 16).requires_grad_()
    targets = torch.randint(97, (len(owners),))
    output = torch.nn.Linear(16, 97, bias=False)
    output.weight = torch.nn.Parameter(weight.detach())

    def pairwise(sums: Tensor, owners: slice) -> Tensor:
        return -logsigmoid(0.3 * (sums[0::2] - sums[1::2])).sum()

    def all_of_it() -> dict[str, Tensor]:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bf16"):
            sums = loss_of_sums(
                hidden, weight, targets, owners, chunks_of(COUNTS, 2, chunk_tokens), pairwise, chunk_tokens
            )
            tokens = loss_of_tokens(hidden, weight, targets, 0.1, chunk_tokens)
            log_probs = token_log_probs(hidden, output, targets, chunk_tokens)
        of_sums, of_tokens = (torch.autograd.grad(loss, (hidden, weight)) for loss in (sums, tokens))
        return {
            "loss of sums": sums,
            "loss of tokens": tokens,
            "of hidden by sums": of_sums[0],
            "of weight by sums": of_sums[1],
            "of hidden by tokens": of_tokens[0],
            "of weight by tokens": of_tokens[1],
            "log-probabilities": log_probs,
        }

    by_torch = all_of_it()
    with logit_kernels.using("liger"):
        by_liger = all_of_it()
    return {name: ((by_liger[name] - wanted).norm() / wanted.norm()).item() for name, wanted in by_torch.items()}


if __name__ == "__main__":
    main()
