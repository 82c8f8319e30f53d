"""Pretraining against transformers.Trainer, same rows and model, fp32: python bench/pretrain.py [--json FILE] [--quick]

Rows of 512 tokens of Python's help texts, 4 a step. transformers gets whatever batching it does best here
(`--their-parts`: micro-batches of a step). Aims: head-heavy at least 1.8 x the tokens a second at 0.4 x the peak memory
or less; body-heavy at least 1.1 x.
"""

import argparse
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

from arithmetic import body_flops, head_flops
from peers import Clock, alternate, compare, head, report, resident_bytes, row_of, save, table, work
from work import SHAPES, config_of, help_text, tokenizer_of

from llmtrain.config.root import TrainConfig

ROWS_PER_STEP = 4
ROW_TOKENS = 512
BARS = {"head": "1.8 at 0.4", "body": "1.1"}


def config(shape: str, chosen: argparse.Namespace) -> TrainConfig:
    inputs = ROW_TOKENS - 1  # the last token of a row is only predicted
    changes = {
        "trainer.batch_rows": ROWS_PER_STEP,
        "trainer.sequence_tokens": inputs,
        "trainer.budget_tokens": inputs * ROWS_PER_STEP * (chosen.steps + 1),
        "infra.loss_chunk_tokens": chosen.chunk_tokens,
        "infra.micro_batch_tokens": chosen.row_tokens,
    }
    changes |= {"infra.compile": chosen.compile}
    return config_of(SHAPES[shape], "pretrain", **changes)


def written(run: TrainConfig, tokenizer_directory: Path, directory: Path) -> Any:
    """The text as llmtrain's shards, one document, of just so many rows."""
    import numpy as np

    from llmtrain.data.text import ShardWriter, TokenShards

    ids = tokenizer_of(run.model.vocab_size, tokenizer_directory)(help_text()).input_ids
    num_rows = run.trainer.budget_tokens // run.trainer.sequence_tokens
    writer = ShardWriter(directory, "train", np.dtype("<u4"), shard_tokens=2**20)
    writer.append(ids[: num_rows * run.trainer.sequence_tokens + 1], num_bytes=1)
    writer.close()
    return TokenShards(directory, "train")


def ours(run: TrainConfig, tokenizers: Path, directory: Path) -> None:
    from ours import fit, prepared

    from llmtrain.training.batches import TextSteps
    from llmtrain.training.module import CrossEntropy

    imported = resident_bytes()
    steps = TextSteps(written(run, tokenizers, directory), run.trainer, run.trainer.budget_tokens, "stream", run.infra)
    module = CrossEntropy(prepared(run), run.trainer, run.infra, total_tokens=run.trainer.budget_tokens)
    report(*fit(module, steps, run), imported)


def theirs(run: TrainConfig, tokenizers: Path, directory: Path, parts: int, compiled: bool) -> None:
    import torch
    import transformers
    from ours import network_of, observed, their_settings

    from llmtrain.data.order import shuffled

    imported = resident_bytes()
    shards, row_tokens = written(run, tokenizers, directory), run.trainer.sequence_tokens
    num_rows = shards.num_rows(row_tokens)
    order = [shuffled(position, num_rows, run.trainer.seed) for position in range(num_rows)]
    rows = [torch.from_numpy(shards.row(index, row_tokens)) for index in order]
    network = network_of(run).train()
    clock, losses = Clock(), list[float]()
    trainer = observed(transformers.Trainer, clock, losses, parts)(
        model=network,
        args=transformers.TrainingArguments(
            output_dir=str(directory), torch_compile=compiled, **their_settings(run, parts)
        ),
        train_dataset=[{"input_ids": row, "labels": row} for row in rows],
    )
    trainer.train()
    report(losses, clock, imported)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="*", default=["head", "body"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=3, help="timed steps of each run, after one of warm-up")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--their-parts", type=int, default=1, help="micro-batches in the peer's step")
    parser.add_argument("--compile", action="store_true", help="llmtrain's infra.compile")
    parser.add_argument("--their-compile", action="store_true", help="the peer's torch_compile")
    parser.add_argument("--chunk-tokens", type=int, default=256, help="llmtrain's infra.loss_chunk_tokens")
    parser.add_argument("--row-tokens", type=int, default=4096, help="llmtrain's infra.micro_batch_tokens")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--quick", action="store_true", help="does it run: a tiny network, one round, one step")
    parser.add_argument("--worker", choices=["ours", "theirs"], help=argparse.SUPPRESS)
    parser.add_argument("--directory", type=Path, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.worker:
        (shape,) = chosen.shapes
        with tempfile.TemporaryDirectory(dir=chosen.directory) as own:
            if chosen.worker == "ours":
                ours(config(shape, chosen), chosen.directory, Path(own))
            else:
                theirs(config(shape, chosen), chosen.directory, Path(own), chosen.their_parts, chosen.their_compile)
        return
    if chosen.quick:
        chosen.shapes, chosen.rounds, chosen.steps = ["tiny"], 1, 1
    rows, results = [head("tokens", "transformers")], dict[str, Any]()
    with tempfile.TemporaryDirectory() as made:
        for shape in chosen.shapes:
            tokenizer_of(SHAPES[shape]["vocab_size"], Path(made))
            arguments = ["--shapes", shape, "--directory", made]
            for name in ("steps", "their_parts", "chunk_tokens", "row_tokens"):
                arguments += [f"--{name.replace('_', '-')}", str(getattr(chosen, name))]
            for name in ("compile", "their_compile"):
                arguments += [f"--{name.replace('_', '-')}"] if getattr(chosen, name) else []
            workers = {
                name: partial(work, Path(__file__), [*arguments, "--worker", name], chosen.threads)
                for name in ("ours", "theirs")
            }
            print(shape, flush=True)
            runs = alternate(workers, chosen.rounds)
            found = compare(runs["ours"], runs["theirs"], ROWS_PER_STEP * ROW_TOKENS)
            inputs = ROW_TOKENS - 1
            a_row = body_flops(SHAPES[shape], inputs) + head_flops(SHAPES[shape], inputs)
            results[f"pretrain {shape}"] = found | {"flops_per_step": ROWS_PER_STEP * a_row}
            rows.append(row_of(shape, found, BARS.get(shape, "")))
    print(table(rows))
    save(chosen.json, results)


if __name__ == "__main__":
    main()
