"""From hidden states to the loss and its gradients: python bench/head.py [--device cpu] [--json FILE] [--quick]

`torch` and `liger` are llmtrain's head under its two kernels. Peers: `logits` keeps all of them (torch's
cross_entropy), `liger_flce` is liger-kernel's fused linear cross-entropy with its sums in fp32, `cce` is
cut-cross-entropy. Weights are fp32; on CUDA products are bf16, as in training. A CPU runs `logits` and `torch` (and
liger-kernel's where TRITON_INTERPRET=1, to see that it does). Known of 16k tokens over 248k entries (TRL #6858):
cut-cross-entropy 92.6 ms and 3.1 GB, Liger 321 ms and 6.05 GB.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from peers import MARK, Seen, alternate, resident_bytes, save, table, work

NEEDS = {
    "logits": None,
    "torch": None,
    "liger": "liger_kernel",
    "liger_flce": "liger_kernel",
    "cce": "cut_cross_entropy",
}
ON_CPU = ("logits", "torch")


def loss_by(kernel: str, chunk_tokens: int) -> Callable[..., Any]:
    """(hidden [tokens, width], weight [vocabulary, width], targets [tokens]) -> the mean cross-entropy."""
    import torch
    from torch.nn.functional import cross_entropy

    from llmtrain.models import logit_kernels
    from llmtrain.models.head import loss_of_tokens

    match kernel:
        case "logits":
            return lambda hidden, weight, targets: cross_entropy((hidden @ weight.T).float(), targets)
        case "torch" | "liger":
            logit_kernels.use(kernel)
            return lambda hidden, weight, targets: loss_of_tokens(
                hidden, weight, targets, 1 / len(targets), chunk_tokens
            )
        case "liger_flce":
            from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy as fused

            return lambda hidden, weight, targets: fused(hidden, weight, targets, accum_dtype=torch.float32)
        case _:
            from cut_cross_entropy import linear_cross_entropy

            return lambda hidden, weight, targets: linear_cross_entropy(hidden.bfloat16(), weight, targets)


def worker(chosen: argparse.Namespace) -> None:
    import torch

    torch.manual_seed(0)
    device, width = chosen.device, chosen.width
    hidden = torch.randn(chosen.tokens, width, device=device).requires_grad_()
    weight = (torch.randn(chosen.vocabulary, width, device=device) * width**-0.5).requires_grad_()
    targets = torch.randint(chosen.vocabulary, (chosen.tokens,), device=device)
    (kernel,) = chosen.kernels
    loss_of = loss_by(kernel, chosen.chunk_tokens)
    on_cuda = device == "cuda"
    wait = torch.cuda.synchronize if on_cuda else nullcontext
    seen = Seen(imported_bytes=resident_bytes())
    for step in range(chosen.steps + 1):
        wait()
        start, cpu_start = time.perf_counter(), time.process_time()
        with torch.autocast("cuda", dtype=torch.bfloat16) if on_cuda else nullcontext():
            loss = loss_of(hidden, weight, targets)
        loss.backward()
        wait()
        seen.losses.append(loss.item())
        if step:
            seen.seconds.append(time.perf_counter() - start)
            seen.cpu_seconds.append(time.process_time() - cpu_start)
        hidden.grad = weight.grad = None
    seen.peak_bytes = torch.cuda.max_memory_allocated() if on_cuda else resident_bytes("VmHWM")
    print(MARK + json.dumps(asdict(seen)), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kernels", nargs="+", choices=list(NEEDS))
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    parser.add_argument("--tokens", type=int, default=16_384)
    parser.add_argument("--vocabulary", type=int, default=248_320)
    parser.add_argument("--width", type=int, default=1_024)
    parser.add_argument("--chunk-tokens", type=int, default=8_192, help="llmtrain's infra.loss_chunk_tokens")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=10, help="timed ones of each run, after one of warm-up")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--quick", action="store_true", help="does it run: tiny, one round, one step, on the CPU")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.worker:
        worker(chosen)
        return
    if chosen.quick:
        chosen.device, chosen.tokens, chosen.vocabulary, chosen.width, chosen.chunk_tokens = "cpu", 64, 500, 16, 32
        chosen.rounds = chosen.steps = 1
    installed = [name for name, package in NEEDS.items() if package is None or find_spec(package)]
    kernels = chosen.kernels or (ON_CPU if chosen.device == "cpu" else installed)
    sizes = {
        name: getattr(chosen, name) for name in ("device", "tokens", "vocabulary", "width", "chunk_tokens", "steps")
    }
    arguments = [text for name, value in sizes.items() for text in (f"--{name.replace('_', '-')}", str(value))]
    workers = {name: partial(work, Path(__file__), [*arguments, "--worker", "--kernels", name], 0) for name in kernels}
    runs = alternate(workers, chosen.rounds, equal_losses=chosen.device == "cpu")  # bf16 rounds differently in each
    found = {
        name: {
            "milliseconds": 1000 * statistics.median(seen.seconds_per_step for seen in rounds),
            "peak_gb": statistics.median(seen.peak_bytes for seen in rounds) / 1e9,
            "loss": rounds[0].losses[-1],
        }
        for name, rounds in runs.items()
    }
    rows = [[name, *(f"{value:.4g}" for value in figures.values())] for name, figures in found.items()]
    print(table([["kernel", "ms", "peak GB", "loss"], *rows]))
    save(chosen.json, {f"head {chosen.device}": sizes | {"rounds": chosen.rounds, "kernels": found}})


if __name__ == "__main__":
    main()
