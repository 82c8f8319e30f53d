"""SFT against TRL's SFTTrainer with packing, same packed rows, fp32: python bench/sft.py [--json FILE] [--quick]

GSM8K as chats, loss on the answers, packed by TRL itself (best fit, rows of 512 tokens, attention kept within each
chat) and given to both; 4 rows a step. TRL runs padding-free, a step as one row. Aim: at least 1.5 x.
"""

import argparse
import json
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

from peers import Clock, alternate, compare, head, report, resident_bytes, row_of, save, table, work
from work import SHAPES, chats_of, config_of, tokenizer_of

from llmtrain.config.root import TrainConfig

ROWS_PER_STEP = 4
ROW_TOKENS = 512
Rows = list[dict[str, list[int]]]
"""input_ids and labels (-100: no target) of the chats of a row end to end, and seq_lengths, those of each chat"""


def config(shape: str, chosen: argparse.Namespace) -> TrainConfig:
    changes = {
        "trainer.batch_rows": ROWS_PER_STEP,
        "trainer.sequence_tokens": ROW_TOKENS,
        "infra.loss_chunk_tokens": chosen.chunk_tokens,
        "infra.micro_batch_tokens": chosen.row_tokens,
    }
    return config_of(SHAPES[shape], "sft", **changes)


class PackedRows:
    """TRL's rows in TRL's order, as llmtrain's steps."""

    def __init__(self, rows: Rows, run: TrainConfig) -> None:
        self.rows, self.run, self.per_step = rows, run, run.trainer.batch_rows

    def __len__(self) -> int:
        return len(self.rows) // self.per_step

    def tokens_before(self, step: int) -> int:
        return sum(len(row["input_ids"]) for row in self.rows[: step * self.per_step])

    def __getitem__(self, step: int) -> Any:
        from llmtrain.training.batches import StepBatch, packed_rows

        indices = range(step * self.per_step, (step + 1) * self.per_step)
        micro_batches = packed_rows([self.documents(index) for index in indices], indices, self.run.infra)
        num_targets = sum(len(micro_batch.packed.targets) for micro_batch in micro_batches)
        num_tokens = self.tokens_before(step + 1) - self.tokens_before(step)
        return StepBatch(micro_batches, num_units=num_targets, num_tokens=num_tokens)

    def documents(self, index: int) -> list[Any]:
        import numpy as np

        from llmtrain.models.packed import document

        row, found, start = self.rows[index], [], 0
        for length in row["seq_lengths"]:
            ids, labels = (np.array(row[name][start : start + length]) for name in ("input_ids", "labels"))
            found.append(document(ids, labels != -100))
            start += length
        return found


def ours(rows: Rows, run: TrainConfig) -> None:
    from ours import fit, prepared

    from llmtrain.training.module import CrossEntropy

    imported = resident_bytes()
    steps = PackedRows(rows, run)
    module = CrossEntropy(prepared(run), run.trainer, run.infra, total_tokens=steps.tokens_before(len(steps)))
    report(*fit(module, steps, run), imported)


def trl(rows: Rows, run: TrainConfig, directory: Path) -> None:
    import trl
    from datasets import Dataset
    from ours import network_of, observed, their_settings

    imported = resident_bytes()
    network = network_of(run)
    clock, losses = Clock(), list[float]()
    settings = their_settings(run, 1)
    trainer = observed(trl.SFTTrainer, clock, losses, 1)(
        model=network,
        args=trl.SFTConfig(
            output_dir=str(directory), packing=True, packing_strategy="bfd", max_length=ROW_TOKENS, **settings
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer_of(run.model.vocab_size, directory.parent),
    )
    trainer.train()
    report(losses, clock, imported)


def packed_by_trl(shape: str, data: str, number: int, directory: Path) -> Rows:
    """The first `number` rows that TRL's packing makes of the chats that fit a row."""
    from datasets import Dataset
    from trl import pack_dataset

    chats = chats_of(data, number * 12, tokenizer_of(SHAPES[shape]["vocab_size"], directory))
    chats = [chat for chat in chats if len(chat["input_ids"]) <= ROW_TOKENS]
    return list(pack_dataset(Dataset.from_list(chats), ROW_TOKENS, "bfd"))[:number]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="*", default=["head", "body"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=3, help="timed steps of each run, after one of warm-up")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--chunk-tokens", type=int, default=256, help="llmtrain's infra.loss_chunk_tokens")
    parser.add_argument("--row-tokens", type=int, default=4096, help="llmtrain's infra.micro_batch_tokens")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--quick", action="store_true", help="does it run: a tiny network, one round, one step")
    parser.add_argument("--worker", choices=["ours", "trl"], help=argparse.SUPPRESS)
    parser.add_argument("--directory", type=Path, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.worker:
        (shape,) = chosen.shapes
        data = json.loads((chosen.directory / f"{shape}.json").read_bytes())
        if chosen.worker == "ours":
            ours(data, config(shape, chosen))
        else:
            with tempfile.TemporaryDirectory(dir=chosen.directory) as own:
                trl(data, config(shape, chosen), Path(own))
        return
    if chosen.quick:
        chosen.shapes, chosen.rounds, chosen.steps = ["tiny"], 1, 1
    rows, results = [head("tokens", "TRL")], dict[str, Any]()
    with tempfile.TemporaryDirectory() as made:
        for shape in chosen.shapes:
            packed = packed_by_trl(
                shape, "help" if chosen.quick else "gsm8k", ROWS_PER_STEP * (chosen.steps + 1), Path(made)
            )
            (Path(made) / f"{shape}.json").write_text(json.dumps(packed))
            arguments = ["--shapes", shape, "--directory", made]
            for name in ("chunk_tokens", "row_tokens"):
                arguments += [f"--{name.replace('_', '-')}", str(getattr(chosen, name))]
            workers = {
                name: partial(work, Path(__file__), [*arguments, "--worker", name], chosen.threads)
                for name in ("ours", "trl")
            }
            print(shape, flush=True)
            runs = alternate(workers, chosen.rounds)
            tokens = sum(len(row["input_ids"]) for row in packed) / (chosen.steps + 1)
            results[f"sft {shape}"] = compare(runs["ours"], runs["trl"], tokens)
            rows.append(row_of(shape, results[f"sft {shape}"], "1.5"))
    print(table(rows))
    save(chosen.json, results)


if __name__ == "__main__":
    main()
