"""One form of a model, measured in a process of its own: python -m llmtrain.optimise.measure < JOB.json

It is driven by the four verbs that it is served by. Prints one line of JSON after `MARK`.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Literal

import numpy as np

from llmtrain.errors import RunFailed
from llmtrain.serving.runtime import Runtime

MARK = "measured: "
FED_TOKENS = 512
"""Most tokens whose logits exist at a time."""


@dataclass(frozen=True)
class Job:
    """What is measured."""

    engine: Literal["torch", "onnx", "torchao"]
    directory: str
    precision: Literal["fp32", "bf16"]
    """What PyTorch computes in; an ONNX graph has its own."""
    providers: tuple[str, ...]
    threads: int
    documents: tuple[tuple[int, ...], ...]
    """For the quality; none: speed only."""
    batch_sizes: tuple[int, ...]
    """For the speed; none: quality only."""
    prompt_tokens: int
    new_tokens: int


@dataclass(frozen=True)
class Seen:
    """What was seen. Speeds by batch size, which JSON has as text."""

    losses: list[float]
    """Of each document: mean negative log-probability of a token, nats."""
    likeliest: list[list[int]]
    """Of each document: the likeliest token at every position."""
    load_seconds: float
    first_token_seconds: float
    """From a prompt of `prompt_tokens` to the first token's logits, alone."""
    prefill: dict[str, float]
    """Prompt tokens a second."""
    decode: dict[str, float]
    """New tokens a second, of all sequences together."""
    peak_bytes: int
    """VmHWM of the process: interpreter, imports and loading included."""


def in_child(job: Job) -> Seen:
    """Measure in a process of its own: its memory is the form's. Raises RunFailed, with its last lines, if it fails."""
    environment = os.environ | {"OMP_NUM_THREADS": str(job.threads), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "llmtrain.optimise.measure"],
        input=json.dumps(asdict(job)),
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith(MARK)]
    if done.returncode or not lines:
        last = "\n".join((done.stdout + done.stderr).splitlines()[-20:])
        raise RunFailed(f"{job.directory} cannot be measured, the process ended with {done.returncode}:\n{last}")
    return Seen(**json.loads(lines[-1].removeprefix(MARK)))


def runtime_of(job: Job) -> Runtime:
    """The form behind the verbs that serve it."""
    longest = max((len(ids) for ids in job.documents), default=0)
    sizes = {
        "max_sequences": max(job.batch_sizes, default=1),
        "context_tokens": max(longest, job.prompt_tokens + job.new_tokens),
    }
    directory = Path(job.directory)
    match job.engine:
        case "onnx":
            from llmtrain.serving import onnx_runtime

            return onnx_runtime.load(directory, providers=job.providers, threads=job.threads, **sizes)
        case "torch":
            from llmtrain.serving import torch_runtime

            return torch_runtime.load(directory, device="cpu", precision=job.precision, threads=job.threads, **sizes)
        case "torchao":
            from llmtrain.optimise.torchao_weights import load
            from llmtrain.serving.torch_runtime import TorchRuntime

            return TorchRuntime(load(directory, job.threads), **sizes)


def quality(runtime: Runtime, ids: Sequence[int]) -> tuple[float, list[int]]:
    """Mean negative log-probability of all tokens but the first, in nats, and the likeliest token at each position."""
    losses, likeliest = list[float](), list[int]()
    for start in range(0, len(ids), FED_TOKENS):
        logits = runtime.feed(0, ids[start : start + FED_TOKENS], "all").astype(np.float64)
        likeliest += logits.argmax(1).tolist()
        following = np.array(ids[start + 1 : start + 1 + len(logits)], np.int64)
        logits = logits[: len(following)]
        peaks = logits.max(1)
        normalisers = peaks + np.log(np.exp(logits - peaks[:, None]).sum(1))
        losses += (normalisers - logits[np.arange(len(following)), following]).tolist()
    runtime.drop(0)
    return sum(losses) / len(losses), likeliest


def speed(runtime: Runtime, num_sequences: int, prompt_tokens: int, new_tokens: int) -> tuple[float, float]:
    """(seconds for all prompts, seconds for a token of each): sequences of random tokens, the likeliest ones follow."""
    random = np.random.default_rng(0)
    prompts = random.integers(0, runtime.vocab_size, (num_sequences, prompt_tokens))
    slots = list(range(num_sequences))
    started = time.perf_counter()
    ids = [int(runtime.feed(slot, prompts[slot].tolist(), "last")[0].argmax()) for slot in slots]
    prefill = time.perf_counter() - started
    seconds = []
    for _ in range(new_tokens):
        started = time.perf_counter()
        ids = runtime.step(slots, ids).argmax(1).tolist()
        seconds.append(time.perf_counter() - started)
    for slot in slots:
        runtime.drop(slot)
    return prefill, median(seconds)


def measure(job: Job) -> Seen:
    started = time.perf_counter()
    runtime = runtime_of(job)
    load_seconds = time.perf_counter() - started
    found = [quality(runtime, ids) for ids in job.documents]
    if job.batch_sizes:
        speed(runtime, 1, job.prompt_tokens, 1)  # the first pass makes what later ones find
    speeds = {size: speed(runtime, size, job.prompt_tokens, job.new_tokens) for size in job.batch_sizes}
    first_token = min((speed(runtime, 1, job.prompt_tokens, 1)[0] for _ in range(3)), default=0.0) if speeds else 0.0
    return Seen(
        losses=[loss for loss, _ in found],
        likeliest=[likeliest for _, likeliest in found],
        load_seconds=load_seconds,
        first_token_seconds=first_token,
        prefill={str(size): size * job.prompt_tokens / prefill for size, (prefill, _) in speeds.items()},
        decode={str(size): size / step for size, (_, step) in speeds.items()},
        peak_bytes=_peak_bytes(),
    )


def _peak_bytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))


if __name__ == "__main__":
    asked = json.load(sys.stdin)
    asked["documents"] = tuple(map(tuple, asked["documents"]))
    print(MARK + json.dumps(asdict(measure(Job(**asked)))), flush=True)
