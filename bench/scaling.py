"""Cost of a token as context, vocabulary and network grow: python bench/scaling.py [--plots DIR] [--quick]

One axis at a time from a middle point, llmtrain's pretraining steps in fp32, each point a process of its own, the
points in turn. Beside each time stands what arithmetic alone would take at the rate of a large matrix product.
"""

import argparse
import statistics
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

from arithmetic import block_parameters, body_flops, head_flops, products_per_second
from peers import Seen, alternate, report, resident_bytes, save, table, work
from work import SHAPES, config_of, help_text, tokenizer_of

STEP_TOKENS = 2048
MIDDLE = {"context": 512, "vocabulary": 8_192, "width": 384}
AXES = {
    "context": [128, 256, 512, 1024, 2048],
    "vocabulary": [1_024, 8_192, 32_768, 151_936],
    "width": [128, 256, 384, 512, 768],
}


def shape_of(point: dict[str, int]) -> dict[str, int]:
    """Six blocks of this width, with heads of 64 and a feed-forward of three times the width."""
    width = point["width"]
    sizes = {"hidden_size": width, "intermediate_size": 3 * width, "num_hidden_layers": 6, "head_dim": 64}
    heads = {"num_attention_heads": width // 64, "num_key_value_heads": max(1, width // 128)}
    return SHAPES["body"] | sizes | heads | {"vocab_size": point["vocabulary"]}


def measure(point: dict[str, int], num_steps: int, tokenizers: Path, directory: Path) -> None:
    import numpy as np
    from ours import fit, prepared

    from llmtrain.data.text import ShardWriter, TokenShards
    from llmtrain.training.batches import TextSteps
    from llmtrain.training.module import CrossEntropy

    imported, context = resident_bytes(), point["context"]
    changes = {
        "trainer.batch_rows": max(1, STEP_TOKENS // context),
        "trainer.sequence_tokens": context,
        "trainer.budget_tokens": STEP_TOKENS * (num_steps + 1),
        "infra.loss_chunk_tokens": 256,
        "infra.micro_batch_tokens": STEP_TOKENS,
    }
    run = config_of(shape_of(point), "pretrain", **changes)
    ids = tokenizer_of(1_024, tokenizers)(help_text()).input_ids  # a smaller tokenizer's ids fit every vocabulary
    writer = ShardWriter(directory, "train", np.dtype("<u4"), shard_tokens=2**20)
    writer.append(ids[: run.trainer.budget_tokens + 1], num_bytes=1)
    writer.close()
    shards = TokenShards(directory, "train")
    steps = TextSteps(shards, run.trainer, run.trainer.budget_tokens, "stream", run.infra)
    module = CrossEntropy(prepared(run), run.trainer, run.infra, total_tokens=run.trainer.budget_tokens)
    report(*fit(module, steps, run), imported)


def summary(point: dict[str, int], runs: list[Seen], rate: float) -> dict[str, float]:
    """Medians over rounds; `bound_us` is the arithmetic of a token at `rate` operations a second."""
    shape, context = shape_of(point), point["context"]
    flops = (body_flops(shape, context) + head_flops(shape, context)) / context
    return point | {
        "us_per_token": 1e6 * statistics.median(run.seconds_per_step for run in runs) / STEP_TOKENS,
        "bound_us": 1e6 * flops / rate,
        "mflop_per_token": flops / 1e6,
        "parameters": block_parameters(shape) + shape["vocab_size"] * shape["hidden_size"],
        "peak_gb": statistics.median(run.peak_bytes for run in runs) / 1e9,
    }


def plot(results: dict[str, list[dict[str, float]]], path: Path) -> None:
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot as plt

    figure, panels = plt.subplots(1, len(results), figsize=(4 * len(results), 3.4), sharey=True, layout="tight")
    for panel, (axis, points) in zip(panels, results.items(), strict=True):
        x = [point[axis] for point in points]
        panel.loglog(x, [point["us_per_token"] for point in points], marker="o", label="measured")
        panel.loglog(x, [point["bound_us"] for point in points], linestyle=":", label="arithmetic alone")
        panel.set_xticks(x, [f"{value:,}" for value in x], rotation=45)
        panel.minorticks_off()
        panel.set_xlabel({"context": "context, tokens", "vocabulary": "vocabulary, entries"}.get(axis, axis))
        panel.grid(alpha=0.3)
    ticks = [100, 200, 500, 1_000, 2_000, 5_000]
    panels[0].set_yticks(ticks, [f"{tick:,}" for tick in ticks])
    panels[0].set_ylabel("microseconds a token")
    panels[0].legend()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=2, help="timed steps of each run, after one of warm-up")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--plots", type=Path, help="directory for scaling.png")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--quick", action="store_true", help="does it run: two small points, one round, one step")
    parser.add_argument("--worker", nargs=3, type=int, help=argparse.SUPPRESS)
    parser.add_argument("--directory", type=Path, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.worker:
        with tempfile.TemporaryDirectory(dir=chosen.directory) as own:
            measure(dict(zip(MIDDLE, chosen.worker, strict=True)), chosen.steps, chosen.directory, Path(own))
        return
    axes, middle = AXES, MIDDLE
    if chosen.quick:
        axes, middle = {"context": [128, 256]}, {"context": 128, "vocabulary": 1_024, "width": 64}
        chosen.rounds = chosen.steps = 1
    points = {tuple((middle | {axis: value}).values()) for axis, values in axes.items() for value in values}
    with tempfile.TemporaryDirectory() as made:
        tokenizer_of(1_024, Path(made))
        workers = {}
        for point in sorted(points):
            arguments = ["--worker", *map(str, point), "--steps", str(chosen.steps), "--directory", made]
            workers[" ".join(map(str, point))] = partial(work, Path(__file__), arguments, chosen.threads)
        runs = alternate(workers, chosen.rounds, equal_losses=False)
    rate, results = products_per_second(2048, 1024, 4096), dict[str, list[dict[str, Any]]]()
    for axis, values in axes.items():
        cases = [middle | {axis: value} for value in values]
        results[axis] = [summary(case, runs[" ".join(map(str, case.values()))], rate) for case in cases]
        rows = [[axis, "us a token", "arithmetic alone, us", "share", "MFLOP a token", "parameters, M", "peak, GB"]]
        for point in results[axis]:
            share = point["bound_us"] / point["us_per_token"]
            figures = f"{point['us_per_token']:.0f}", f"{point['bound_us']:.0f}", f"{share:.0%}"
            sizes = f"{point['mflop_per_token']:.0f}", f"{point['parameters'] / 1e6:.1f}", f"{point['peak_gb']:.2f}"
            rows.append([f"{point[axis]:,}", *figures, *sizes])
        print(table(rows), end="\n\n")
    print(f"a product of 2048 x 1024 x 4096: {rate / 1e9:.0f} GFLOP/s")
    if chosen.plots and not chosen.quick:
        plot(results, chosen.plots / "scaling.png")
    save(chosen.json, {"scaling": results})


if __name__ == "__main__":
    main()
