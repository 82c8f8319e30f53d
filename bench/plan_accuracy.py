"""Does the plan come true here? python bench/plan_accuracy.py DIRECTORY [NUMBER ...] [--quick]

Runs the calibration points where DIRECTORY has them not yet, then all held-out points, or those of the given numbers.
These are each a factor of two or more away from all calibration points on some axis (parameters, micro-batch, length,
steps' tokens, or another trainer), and every one is a fresh `llmtrain train` in DIRECTORY.
Each held-out point learns from the calibration runs and not from other held-out ones. A run's plan_vs_actual.json has
what was predicted before it and what came. Aims: peak memory within 5 %, step time within 10 %. Times mean something on
a quiet machine only.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
TOKENS = 2**16
"""Of a run: some ten seconds of a small network, because others who use the machine disturb single seconds."""
NEVER = 10**12


@dataclass(frozen=True)
class Point:
    name: str
    overrides: tuple[str, ...]


def text(name: str, rows: int, length: int, micro_batch: int, *overrides: str) -> Point:
    """Pretraining with steps of `rows` rows of `length` tokens."""
    budget = f"trainer.budget_tokens={max(20 * rows * length, TOKENS)}"
    shape = (
        f"trainer.batch_rows={rows}",
        f"trainer.sequence_tokens={length}",
        f"infra.micro_batch_tokens={micro_batch}",
    )
    return Point(name, ("trainer=pretrain", budget, *shape, *overrides))


def pairs(name: str, rows: int, micro_batch: int, *overrides: str) -> Point:
    """Preference tuning of a network with fresh weights: what it learns is of no interest here."""
    shape = (f"trainer.batch_rows={rows}", f"data.pairs.max_training_pairs={max(20 * rows, 320)}")
    return Point(name, ("trainer=dpo", *shape, f"infra.micro_batch_tokens={micro_batch}", *overrides))


WIDE = (
    "model.hidden_size=384",
    "model.intermediate_size=1024",
    "model.num_attention_heads=12",
    "model.num_key_value_heads=4",
)
CALIBRATION = (
    text("small, 8 x 256, 2,048 at once", 8, 256, 2048),
    text("small, 4 x 512, 1,024 at once", 4, 512, 1024),
    text("small, 16 x 128, 2,048 at once", 16, 128, 2048),
    text("wide, 8 x 256, 2,048 at once", 8, 256, 2048, *WIDE),
    pairs("small, 8 pairs, 2,048 at once", 8, 2048),
)
HELD_OUT = (
    text("micro-batch x 4: small, 32 x 256", 32, 256, 8192),
    text("length x 2: small, 4 x 1,024", 4, 1024, 2048),
    text("depth x 3: small with 12 layers", 8, 256, 2048, "model.num_hidden_layers=12"),
    text("width x 2: wider still", 4, 256, 1024, "model.hidden_size=768", "model.intermediate_size=2048",
         "model.num_attention_heads=24", "model.num_key_value_heads=8"),
    text("vocabulary x 8: small, 32,768 rows", 8, 256, 2048, "model.vocab_size=32768"),
    text("recomputation: small, 8 x 256", 8, 256, 2048, "infra.activation_checkpointing=full"),
    pairs("LoRA, pairs x 2: small, 16 pairs", 16, 4096, "adapter=lora"),
    pairs("pairs x 4: small, 32 pairs", 32, 8192),
    text("length x 2, depth x 2", 2, 1024, 2048, "model.num_hidden_layers=8"),
    text("vocabulary x 4: small, 16,384 rows", 4, 256, 1024, "model.vocab_size=16384"),
    text("parameters x 2: width 512", 4, 256, 1024, "model.hidden_size=512", "model.intermediate_size=1408",
         "model.num_attention_heads=16", "model.num_key_value_heads=4"),
    text("micro-batch / 4: small, 8 x 64", 8, 64, 512),
    text("depth / 2, micro-batch x 2", 16, 256, 4096, "model.num_hidden_layers=2"),
    text("feed-forward x 4: small", 8, 256, 2048, "model.intermediate_size=2048"),
    text("steps of 4 micro-batches: small", 32, 256, 2048),
    pairs("depth x 2, pairs: small, 8 layers", 8, 2048, "model.num_hidden_layers=8"),
    pairs("parameters x 4, pairs: wide", 16, 4096, *WIDE),
    text("wide, depth x 2, length x 2", 2, 1024, 2048, "model.num_hidden_layers=8", *WIDE),
    text("vocabulary x 4, wide", 4, 512, 2048, "model.vocab_size=16384", *WIDE),
)  # fmt: skip
SMALLEST = 11
FIXED = (
    "tracking=none", "model=qwen3_small", "infra.precision=fp32", "trainer.warmup_tokens=10", "trainer.sample_tokens=0",
    f"trainer.evaluate_every_tokens={NEVER}", f"trainer.checkpoint_every_tokens={NEVER}",
    f"trainer.log_every_tokens={NEVER}",
)  # fmt: skip


def run(point: Point, directory: Path, group: str, number: int) -> dict[str, float]:
    """Train a point in a fresh process; returns predicted and measured figures."""
    name = f"{group}-{number}"
    overrides = [*FIXED, *point.overrides, f"name={name}", f"outputs_dir={directory}"]
    environment = os.environ | {"OMP_NUM_THREADS": str(len(os.sched_getaffinity(0)))}
    done = subprocess.run(
        [sys.executable, "train.py", *overrides], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    found = list(directory.glob(f"{name}/*/plan_vs_actual.json"))
    if not found:
        sys.exit(f"{point.name}: no plan_vs_actual.json\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}")
    record = json.loads(found[-1].read_bytes())
    predicted, measured = record["prediction"]["predicted"], record["measured"]
    return {
        "mib": predicted["peak_bytes"] / 2**20,
        "mib measured": measured["peak_bytes"] / 2**20,
        "seconds": predicted["seconds_per_step"],
        "seconds measured": measured["seconds_per_step"],
    }


def show(point: Point, directory: Path, group: str, number: int) -> tuple[float, float]:
    """Run it and print a line; returns the errors of memory and of time."""
    found = run(point, directory, group, number)
    memory = found["mib"] / found["mib measured"] - 1
    time = found["seconds"] / found["seconds measured"] - 1
    print(
        f"{point.name:36} {found['mib']:7.0f} {found['mib measured']:9.0f} {memory:+7.1%}   "
        f"{found['seconds']:7.3f} {found['seconds measured']:9.3f} {time:+7.1%}",
        flush=True,
    )
    return abs(memory), abs(time)


def main(directory: Path, calibration: Sequence[Point], numbers: Sequence[int]) -> None:
    print(f"{'point':36} {'MiB':>7} {'measured':>9} {'error':>7}   {'s/step':>7} {'measured':>9} {'error':>7}")
    taught = directory / "calibration"
    for number, point in enumerate(calibration):
        if not list(taught.glob(f"calibration-{number}/*/plan_vs_actual.json")):
            show(point, taught, "calibration", number)
    print("held out:")
    errors = []
    for number in numbers:
        own = directory / f"held-out-{number}"
        shutil.rmtree(own, ignore_errors=True)  # of an earlier call
        shutil.copytree(taught, own)
        errors.append(show(HELD_OUT[number], own, "held-out", number))
    memories, times = zip(*errors, strict=True)
    print(
        f"of {len(errors)}: peak memory within 5 % {sum(error <= 0.05 for error in memories)}, "
        f"step time within 10 % {sum(error <= 0.1 for error in times)}"
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("numbers", type=int, nargs="*", metavar="NUMBER")
    parser.add_argument("--quick", action="store_true", help="does it run: one calibration run, the smallest point")
    chosen = parser.parse_args()
    if unknown := set(chosen.numbers) - set(range(len(HELD_OUT))):
        parser.error(f"no held-out point {min(unknown)}: they are 0 to {len(HELD_OUT) - 1}")
    if chosen.quick:
        main(chosen.directory.resolve(), CALIBRATION[:1], [SMALLEST])
    else:
        main(chosen.directory.resolve(), CALIBRATION, chosen.numbers or range(len(HELD_OUT)))
