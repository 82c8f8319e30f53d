"""DPO against TRL's DPOTrainer, same pairs, same order, fp32: python bench/dpo.py [--json FILE] [--quick]

Both start from the same weights and see 8 pairs a step; TRL has its reference precomputed and whatever batching it
does best here (`--trl-parts`: micro-batches of a step). Cases: a head-heavy and a body-heavy network of over 40 M
parameters; PandaLM's pairs, and prompts of 1,000 tokens. Aims: head-heavy on PandaLM at least 8 x the pairs a second
at 0.35 x the peak memory or less; long prompts at least 2 x beyond what computing each prompt once explains.
"""

import argparse
import json
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

from arithmetic import dpo_flops
from peers import Clock, alternate, compare, head, report, resident_bytes, row_of, save, table, work
from work import SHAPES, config_of, pairs_of, tokenizer_of

from llmtrain.config.root import TrainConfig

PAIRS_PER_STEP = 8
CASES = [("head", "pandalm"), ("body", "pandalm"), ("head", "long"), ("body", "long")]
BARS = {("head", "pandalm"): "8 at 0.35"}


def config(shape: str, chunk_tokens: int, row_tokens: int) -> TrainConfig:
    changes = {
        "trainer.batch_rows": PAIRS_PER_STEP,
        "infra.loss_chunk_tokens": chunk_tokens,
        "infra.micro_batch_tokens": row_tokens,
    }
    return config_of(SHAPES[shape], "dpo", **changes)


def ours(pairs: list[dict[str, list[int]]], run: TrainConfig, directory: Path) -> None:
    import numpy as np
    from ours import fit, prepared

    from llmtrain.data.preferences import Pair, PairText, PairWriter, PreferencePairs
    from llmtrain.training.batches import PairSteps
    from llmtrain.training.evaluation import score_pairs
    from llmtrain.training.module import DirectPreference

    imported = resident_bytes()
    writer = PairWriter(directory, "train", np.dtype("<u4"))
    for pair in pairs:
        ids = (np.array(pair[f"{name}_ids"]) for name in ("prompt", "chosen", "rejected"))
        writer.append(Pair(*ids), PairText("", "", "", ""))
    writer.close()
    written = PreferencePairs(directory, "train")
    network = prepared(run)
    reference = score_pairs(network, written, list(range(len(written))), run.infra)
    steps = PairSteps(written, reference, run.trainer, run.infra)
    module = DirectPreference(network, run.trainer, run.infra, total_tokens=steps.tokens_before(len(steps)))
    report(*fit(module, steps, run), imported)


def trl(pairs: list[dict[str, list[int]]], run: TrainConfig, directory: Path, parts: int) -> None:
    import trl
    from datasets import Dataset
    from ours import network_of, observed, their_settings

    from llmtrain.data.order import shuffled

    imported = resident_bytes()
    network = network_of(run)
    order = [shuffled(position, len(pairs), run.trainer.seed) for position in range(len(pairs))]
    clock, losses = Clock(), list[float]()
    trainer = observed(trl.DPOTrainer, clock, losses, parts)(
        model=network,
        args=trl.DPOConfig(
            output_dir=str(directory),
            beta=run.trainer.beta,
            precompute_ref_log_probs=True,
            max_length=None,
            **their_settings(run, parts),
        ),
        train_dataset=Dataset.from_list([pairs[index] for index in order]),
        processing_class=tokenizer_of(run.model.vocab_size, directory.parent),
    )
    trainer.train()
    report(losses, clock, imported)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="*", default=[f"{shape}-{data}" for shape, data in CASES])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=3, help="timed steps of each run, after one of warm-up")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--trl-parts", type=int, default=1, help="micro-batches in TRL's step")
    parser.add_argument("--chunk-tokens", type=int, default=256, help="llmtrain's infra.loss_chunk_tokens")
    parser.add_argument("--row-tokens", type=int, default=4096, help="llmtrain's infra.micro_batch_tokens")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--quick", action="store_true", help="does it run: a tiny network, one round, one step")
    parser.add_argument("--worker", choices=["ours", "trl"], help=argparse.SUPPRESS)
    parser.add_argument("--directory", type=Path, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.worker:
        (case,) = chosen.cases
        pairs = json.loads((chosen.directory / f"{case}.json").read_bytes())
        run = config(case.split("-")[0], chosen.chunk_tokens, chosen.row_tokens)
        with tempfile.TemporaryDirectory(dir=chosen.directory) as own:
            if chosen.worker == "ours":
                ours(pairs, run, Path(own))
            else:
                trl(pairs, run, Path(own), chosen.trl_parts)
        return
    if chosen.quick:
        chosen.cases, chosen.rounds, chosen.steps = ["tiny-short"], 1, 1
    rows, results = [head("pairs", "TRL")], dict[str, Any]()
    with tempfile.TemporaryDirectory() as made:
        for case in chosen.cases:
            found = compared(case, chosen, Path(made))
            results[f"dpo {case}"] = found
            rows.append(row_of(case, found, BARS.get(tuple(case.split("-")), "")))
    print(table(rows))
    for case, found in results.items():
        print(f"{case}: {found['flops_ratio']:.2f} x the arithmetic of ours is done by TRL's form without padding")
    save(chosen.json, results)


def compared(case: str, chosen: argparse.Namespace, directory: Path) -> dict[str, Any]:
    shape, data = case.split("-")
    number = PAIRS_PER_STEP * (chosen.steps + 1)
    pairs = pairs_of(data, number, tokenizer_of(SHAPES[shape]["vocab_size"], directory))
    (directory / f"{case}.json").write_text(json.dumps(pairs))
    arguments = ["--cases", case, "--directory", str(directory)]
    for name in ("trl_parts", "chunk_tokens", "row_tokens"):
        arguments += [f"--{name.replace('_', '-')}", str(getattr(chosen, name))]
    workers = {
        name: partial(work, Path(__file__), [*arguments, "--worker", name], chosen.threads) for name in ("ours", "trl")
    }
    print(case, flush=True)
    runs = alternate(workers, chosen.rounds)
    found = compare(runs["ours"], runs["trl"], PAIRS_PER_STEP)
    shared, plain = dpo_flops(SHAPES[shape], pairs)
    return found | {"flops_per_step": shared * PAIRS_PER_STEP / number, "flops_ratio": plain / shared}


if __name__ == "__main__":
    main()
