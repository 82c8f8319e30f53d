"""llmtrain on one CUDA device, Qwen3-0.6B in bf16: python bench/cuda.py [--kinds pretrain sft dpo restart]

pretrain: all weights, rows of 2,048 tokens; aim on an H100: 116,000 tokens/s, which is 50 % of its 989 TFLOP/s with
          causal attention counted half, 58 % counted in full.
sft:      LoRA, packed rows of 2,048, micro-batches of 2 rows, 4 of them a step; aim: more than 65,000 tokens/s.
dpo:      against TRL's DPOTrainer with its fused output layer, prompts of 1,000 tokens; aim: 2 x.
restart:  from the start of a process to the end of its first step, compiled code cached; aim: 20 s.

`--dry-run` takes the same way with a tiny network on the CPU in fp32: it shows that the script runs, and no speed.
"""

import argparse
import json
import statistics
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

from arithmetic import body_flops, head_flops
from peers import alternate, compare, report, resident_bytes, save, work
from work import SHAPES, help_text, pairs_of, tokenizer_of

from llmtrain.config.compose import load_config
from llmtrain.config.root import TrainConfig

ROW_TOKENS = 2048
PEAK_FLOPS = 989e12
"""Of an H100's dense bf16 products a second."""
AIMS = {"pretrain": "116,000 tokens/s", "sft": "65,000 tokens/s", "dpo": "2 x", "restart": "20 s"}


def config(kind: str, chosen: argparse.Namespace) -> TrainConfig:
    """What a user would type: `model=qwen3_0_6b infra=local_gpu`, and the sizes of the comparison."""
    rows = {"pretrain": 32, "restart": 32, "sft": 8, "dpo": 8}[kind]
    row_tokens = 64 if chosen.dry_run else ROW_TOKENS
    micro_rows = {"sft": 2}.get(kind, 16)
    overrides = {
        "trainer.batch_rows": rows,
        "trainer.sequence_tokens": row_tokens,
        "trainer.lr": 1e-5,
        "trainer.schedule": "constant",
        "trainer.warmup_tokens": 0,
        "infra.micro_batch_tokens": micro_rows * row_tokens,
    }
    trainer = {"restart": "pretrain"}.get(kind, kind)
    if trainer == "pretrain":
        overrides["trainer.budget_tokens"] = rows * row_tokens * (chosen.steps + 1)
    groups = [f"trainer={trainer}", *(["adapter=lora"] if kind == "sft" else [])]
    if chosen.dry_run:
        sizes = {f"model.{name}": size for name, size in SHAPES["tiny"].items()}
        overrides |= sizes | {"infra.precision": "fp32", "model.max_position_embeddings": 8192}
        groups += ["model=qwen3_tiny", "infra=local_cpu"]
    else:
        groups += ["model=qwen3_0_6b", "infra=local_gpu"]
    return load_config([*groups, *(f"{name}={value}" for name, value in overrides.items())])


def train(kind: str, chosen: argparse.Namespace, directory: Path) -> None:
    """A worker of llmtrain's on text: pretraining, or LoRA with loss on the second half of each document."""
    import numpy as np
    from ours import fit, prepared
    from sft import PackedRows

    from llmtrain.config.adapter import NoAdapter
    from llmtrain.data.text import ShardWriter, TokenShards
    from llmtrain.models.adapter import attach
    from llmtrain.training.batches import TextSteps
    from llmtrain.training.module import CrossEntropy

    imported, run = resident_bytes(), config(kind, chosen)
    row_tokens, num_steps = run.trainer.sequence_tokens, chosen.steps + 1
    ids = tokenizer_of(8_192, chosen.directory)(help_text()).input_ids  # its ids fit every vocabulary
    num_rows = num_steps * run.trainer.batch_rows
    stream = np.resize(np.array(ids), num_rows * row_tokens + 1)
    if kind == "sft":
        documents = np.split(stream[: num_rows * row_tokens], num_rows * 4)
        half = len(documents[0]) // 2
        rows = [
            {
                "input_ids": np.concatenate(group).tolist(),
                "labels": np.concatenate([[-100] * half + part[half:].tolist() for part in group]).tolist(),
                "seq_lengths": [len(part) for part in group],
            }
            for group in (documents[start : start + 4] for start in range(0, len(documents), 4))
        ]
        steps: Any = PackedRows(rows, run)
    else:
        writer = ShardWriter(directory, "train", np.dtype("<u4"), shard_tokens=2**24)
        writer.append(stream, num_bytes=1)
        writer.close()
        shards = TokenShards(directory, "train")
        steps = TextSteps(shards, run.trainer, run.trainer.budget_tokens, "stream", run.infra)
    network = prepared(run)
    if not isinstance(run.adapter, NoAdapter):
        attach(network, run.adapter)
    module = CrossEntropy(network, run.trainer, run.infra, total_tokens=num_rows * row_tokens)
    report(*fit(module, steps, run), imported)


def tokens_per_second(kind: str, chosen: argparse.Namespace, directory: str) -> dict[str, Any]:
    """Of llmtrain alone, medians over rounds."""
    run = config(kind, chosen)
    runs = alternate({kind: partial(work, Path(__file__), worker(kind, "ours", chosen, directory), 0)}, chosen.rounds)
    seconds = statistics.median(seen.seconds_per_step for seen in runs[kind])
    tokens, model = run.trainer.batch_rows * run.trainer.sequence_tokens, run.model.model_dump()
    flops = body_flops(model, ROW_TOKENS) + head_flops(model, ROW_TOKENS)
    rate = tokens / seconds
    return {"tokens_per_second": rate, "mfu_causal": rate * flops / ROW_TOKENS / PEAK_FLOPS, "rounds": chosen.rounds}


def restart(chosen: argparse.Namespace, directory: str) -> dict[str, Any]:
    """Seconds of a process of one step, the first time and then with what the first one cached."""
    seconds = []
    for _ in range(chosen.rounds + 1):
        started = time.perf_counter()
        work(Path(__file__), worker("restart", "ours", chosen, directory), 0)
        seconds.append(time.perf_counter() - started)
    return {"cold_s": seconds[0], "warm_s": statistics.median(seconds[1:])}


def dpo(chosen: argparse.Namespace, directory: str) -> dict[str, Any]:
    workers = {
        name: partial(work, Path(__file__), worker("dpo", name, chosen, directory), 0) for name in ("ours", "trl")
    }
    found = alternate(workers, chosen.rounds, equal_losses=chosen.dry_run)  # bf16 rounds differently in each
    return compare(found["ours"], found["trl"], 8)


def worker(kind: str, peer: str, chosen: argparse.Namespace, directory: str) -> list[str]:
    steps = ["--steps", "0" if kind == "restart" else str(chosen.steps), "--trl-parts", str(chosen.trl_parts)]
    return [
        "--kinds",
        kind,
        "--worker",
        peer,
        "--directory",
        directory,
        *steps,
        *(["--dry-run"] if chosen.dry_run else []),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", nargs="+", default=list(AIMS), choices=list(AIMS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=10, help="timed steps of each run, after one of warm-up")
    parser.add_argument("--trl-parts", type=int, default=1, help="micro-batches in TRL's step")
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--worker", choices=["ours", "trl"], help=argparse.SUPPRESS)
    parser.add_argument("--directory", type=Path, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.worker:
        (kind,) = chosen.kinds
        with tempfile.TemporaryDirectory(dir=chosen.directory) as own:
            if kind != "dpo":
                train(kind, chosen, Path(own))
                return
            import dpo as peers_of_dpo

            pairs, run = json.loads((chosen.directory / "pairs.json").read_bytes()), config("dpo", chosen)
            if chosen.worker == "ours":
                peers_of_dpo.ours(pairs, run, Path(own))
            else:
                peers_of_dpo.trl(pairs, run, Path(own), chosen.trl_parts)
        return
    results = {}
    with tempfile.TemporaryDirectory() as made:
        tokenizer = tokenizer_of(8_192, Path(made))
        pairs = pairs_of("short" if chosen.dry_run else "long", 8 * (chosen.steps + 1), tokenizer)
        (Path(made) / "pairs.json").write_text(json.dumps(pairs))
        for kind in chosen.kinds:
            match kind:
                case "restart":
                    results[f"cuda {kind}"] = restart(chosen, made)
                case "dpo":
                    results[f"cuda {kind}"] = dpo(chosen, made)
                case _:
                    results[f"cuda {kind}"] = tokens_per_second(kind, chosen, made)
            print(f"{kind} (aim {AIMS[kind]}): {json.dumps(results[f'cuda {kind}'])}", flush=True)
    save(chosen.json, results)


if __name__ == "__main__":
    main()
