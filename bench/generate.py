"""The engine against transformers' own `generate`, greedy, in one process: python bench/generate.py MODEL [--json FILE]

MODEL is a Hugging Face directory. Equal prompts and ragged ones (of a quarter to seven quarters of their length; those
of transformers are padded on the left), 1 to 32 at once, no end tokens. `--onnx DIRECTORY` (several) adds what
`llmtrain optimise` made of it. Each round runs all in turn; what is shown is tokens generated per second of the whole:
prompts, choice of tokens and, for the engine, their text; then the ratio to `generate`, and in brackets its range and
the ratio by the clocks of the process's threads, which a busy machine disturbs less. Aim: the engine on PyTorch is no
slower than `generate`.
"""

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from peers import save, table

Prompts = list[list[int]]
Party = Callable[[Prompts, int], list[list[int]]]
"""Prompts and how many tokens to add to each -> the added tokens."""
TRANSFORMERS, ENGINE = "transformers generate", "engine, torch"


def prompts_of(number: int, length: int, ragged: bool, vocab_size: int) -> Prompts:
    import numpy as np

    random = np.random.default_rng(number)
    lengths = random.integers(length // 4, length * 7 // 4 + 1, size=number) if ragged else [length] * number
    return [random.integers(vocab_size, size=int(size)).tolist() for size in lengths]


def transformers_party(directory: Path, precision: str) -> Party:
    import torch
    from transformers import AutoModelForCausalLM

    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, attn_implementation="sdpa").eval()

    @torch.inference_mode()
    def run(prompts: Prompts, number: int) -> list[list[int]]:
        longest = max(map(len, prompts))
        ids, mask = torch.zeros(2, len(prompts), longest, dtype=torch.int64)
        for row, prompt in enumerate(prompts):
            ids[row, longest - len(prompt) :] = torch.tensor(prompt)
            mask[row, longest - len(prompt) :] = 1
        limits = {"max_new_tokens": number, "min_new_tokens": number}
        whole = model.generate(ids, attention_mask=mask, do_sample=False, pad_token_id=0, **limits)
        return whole[:, longest:].tolist()

    return run


def engine_party(runtime: Any, tokenizer: Any, prefill_tokens: int) -> Party:
    from llmtrain.serving.engine import Engine
    from llmtrain.serving.jobs import Choosing, Failed, Job

    engine = Engine(runtime, tokenizer, prefill_tokens=prefill_tokens)

    def run(prompts: Prompts, number: int) -> list[list[int]]:
        for key, prompt in enumerate(prompts):
            engine.add(str(key), Job(tuple(prompt), number, Choosing(temperature=0.0)))
        written: Prompts = [[] for _ in prompts]
        while not engine.is_idle:
            for piece in engine.step():
                if isinstance(piece, Failed):
                    raise piece.error
                written[int(piece.key)] += piece.token_ids
        return written

    return run


def parties_of(chosen: argparse.Namespace, threads: int) -> dict[str, Party]:
    from transformers import AutoTokenizer

    from llmtrain.serving import onnx_runtime, torch_runtime

    tokenizer = AutoTokenizer.from_pretrained(chosen.model)
    room: dict[str, int] = {
        "max_sequences": max(chosen.sequences),
        "context_tokens": 2 * chosen.prompt_tokens + chosen.new_tokens,
        "threads": threads,
    }
    runtime = torch_runtime.load(chosen.model, device="cpu", precision=chosen.precision, **room)
    found = {
        TRANSFORMERS: transformers_party(chosen.model, chosen.precision),
        ENGINE: engine_party(runtime, tokenizer, chosen.prefill_tokens),
    }
    for directory in chosen.onnx:
        runtime_of_it = onnx_runtime.load(directory, providers=["CPUExecutionProvider"], **room)
        found[f"engine, {directory.name}"] = engine_party(runtime_of_it, tokenizer, chosen.prefill_tokens)
    return found


def measure(parties: dict[str, Party], prompts: Prompts, chosen: argparse.Namespace) -> dict[str, Any]:
    """Tokens per second of each party by round, and how many of the engine's tokens are transformers' own."""
    speeds: dict[str, list[float]] = {name: [] for name in parties}
    by_cpu: dict[str, list[float]] = {name: [] for name in parties}
    num_tokens = len(prompts) * chosen.new_tokens
    for number in range(chosen.rounds + 1):
        written = {}
        for name, run in parties.items():
            start, cpu_start = time.perf_counter(), time.process_time()
            written[name] = run(prompts, chosen.new_tokens)
            if number:  # the round before the first is warm-up
                speeds[name].append(num_tokens / (time.perf_counter() - start))
                by_cpu[name].append(num_tokens / (time.process_time() - cpu_start))
    tokens = [zip(*rows, strict=True) for rows in zip(written[TRANSFORMERS], written[ENGINE], strict=True)]
    equal = [one == other for row in tokens for one, other in row]
    return {"tokens_per_second": speeds, "tokens_per_cpu_second": by_cpu, "equal_tokens": sum(equal) / len(equal)}


def ratios_of(found: dict[str, list[float]], name: str) -> list[float]:
    return [own / other for own, other in zip(found[name], found[TRANSFORMERS], strict=True)]


def row_of(case: str, found: dict[str, Any]) -> list[str]:
    speeds, row = found["tokens_per_second"], [case]
    for name, values in speeds.items():
        text = f"{statistics.median(values):.1f}"
        if name != TRANSFORMERS:
            ratios, by_cpu = ratios_of(speeds, name), ratios_of(found["tokens_per_cpu_second"], name)
            text += f" **{statistics.median(ratios):.2f} x** ({min(ratios):.2f} to {max(ratios):.2f}; "
            text += f"CPU {statistics.median(by_cpu):.2f})"
        row.append(text)
    return [*row, f"{found['equal_tokens']:.1%}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--onnx", type=Path, nargs="*", default=[])
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--sequences", type=int, nargs="*", default=[1, 4, 16, 32])
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--prefill-tokens", type=int, default=512, help="the engine's, in a step")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=0, help="0: as many as there are cores")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--quick", action="store_true", help="does it run: one round of few tokens")
    chosen = parser.parse_args()
    if chosen.quick:
        chosen.sequences, chosen.new_tokens, chosen.rounds = [2], 3, 1
    threads = chosen.threads or len(os.sched_getaffinity(0))
    os.environ["OMP_NUM_THREADS"] = str(threads)  # before torch is imported

    parties = parties_of(chosen, threads)
    from transformers import AutoConfig

    vocab_size = AutoConfig.from_pretrained(chosen.model).vocab_size
    rows, results = [["sequences", *(f"{name}, tokens/s" for name in parties), "equal tokens"]], dict[str, Any]()
    for number in chosen.sequences:
        for ragged in (False, True) if number > 1 else (False,):
            case = f"{number} {'ragged' if ragged else 'equal'}"
            found = measure(parties, prompts_of(number, chosen.prompt_tokens, ragged, vocab_size), chosen)
            results[f"generate {chosen.precision} {case}"] = found
            rows.append(row_of(case, found))
            print("  ".join(rows[-1]), file=sys.stderr, flush=True)
    print(table(rows))
    save(chosen.json, results)


if __name__ == "__main__":
    main()
