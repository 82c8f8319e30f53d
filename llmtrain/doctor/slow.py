"""Where the time goes, from the rows of vitals.jsonl."""

from dataclasses import dataclass

import torch
from torch.utils.data import Dataset

from llmtrain.config.frozen import FrozenRun
from llmtrain.config.infra import Infra
from llmtrain.doctor.findings import Finding
from llmtrain.telemetry.vitals import Vitals
from llmtrain.training.batches import StepBatch, padding

Looked = tuple[str, Finding | None]
"""A line that says what was looked at, and what is wrong with it."""

WAITING_SHARE, WAITING_S = 0.15, 0.005
"""A stall: more of the time, and more a step, than this."""
BETWEEN_SHARE, BETWEEN_S = 0.25, 5.0
"""Evaluations or checkpoints that are too many: more of the time, and more in all, than this."""
RECOMPILES = 4
"""A block that is compiled again more often than this has rows of many shapes: evaluation, whose graphs have no
gradient, adds one or two to those of the first step."""
SYNCS_A_STEP, SYNCS_A_MICRO_BATCH = 8, 2
"""Waits for the GPU that a step has by its nature, such as reading its loss, and each of its micro-batches."""
PADDING_SHARE = 0.15
SAMPLED_STEPS = 16
"""Steps whose batches are built again to count their padding."""


@dataclass(frozen=True)
class Sizes:
    """Of the micro-batches of sampled steps, in tokens."""

    with_padding: list[int]
    without: list[int]
    num_steps: int

    @property
    def padding_share(self) -> float:
        return 1 - sum(self.without) / sum(self.with_padding)


def data_stall(rows: list[Vitals], frozen: FrozenRun) -> Looked:
    """Does the step wait for its batch?"""
    total, waited = _total(rows), _spent(rows, "data")
    num_steps = max(1, sum(row.steps_here for row in rows))
    share, a_step = waited / total if total else 0.0, waited / num_steps
    line = f"waiting for data: {share:.0%} of the time, {_milliseconds(a_step)} a step"
    if share < WAITING_SHARE or a_step < WAITING_S:
        return line, None
    worst = max(rows, key=lambda row: row.seconds["data"] / max(1, row.steps_here))
    longest = worst.seconds["data"] / max(1, worst.steps_here)
    return line, Finding(
        kind="data stall",
        seen=f"a step waits {_milliseconds(a_step)} for its batch, and computes "
        f"{_milliseconds((_spent(rows, 'forward_backward') + _spent(rows, 'optimizer')) / num_steps)}; worst "
        f"{_milliseconds(longest)} a step, in steps {worst.first_step} to {worst.step}",
        remedies=(
            f"outputs_dir=DIRECTORY on a disk of this machine, where the prepared tokens are read from (now "
            f"{frozen.config.outputs_dir})",
            f"infra.threads=N below the machine's cores, so that another process leaves the reader its own (now "
            f"{frozen.config.infra.threads or 'every core'})",
        ),
        cost_share=share,
        facts={"seconds": waited, "share": share, "seconds_a_step": a_step},
    )


def between_steps(rows: list[Vitals], frozen: FrozenRun) -> list[Looked]:
    """Do evaluations, or checkpoints, take too much?"""
    total, trainer = _total(rows), frozen.config.trainer
    found: list[Looked] = []
    every = {
        "evaluations": ("evaluation", "evaluate_every_tokens", trainer.evaluate_every_tokens),
        "checkpoints": ("checkpoints", "checkpoint_every_tokens", trainer.checkpoint_every_tokens),
    }
    for kind, (name, setting, tokens) in every.items():
        spent = _spent(rows, name) + (_spent(rows, "report") if kind == "evaluations" else 0.0)
        share = spent / total if total else 0.0
        line = f"{kind}: {share:.0%} of the time, {spent:.1f} s"
        if share < BETWEEN_SHARE or spent < BETWEEN_S:
            found.append((line, None))
            continue
        longer = round(tokens * share * (1 - 0.05) / (0.05 * (1 - share)), -3)
        remedy = f"trainer.{setting}={int(longer)} makes that about 5 % (now {tokens})"
        facts = {"seconds": spent, "share": share}
        seen = f"{spent:.1f} s of {total:.1f} s were spent on {kind}"
        found.append((line, Finding(kind, seen, (remedy,), cost_share=share, facts=facts)))
    return found


def recompiles(rows: list[Vitals], infra: Infra, sizes: Sizes | None) -> Looked:
    """Does torch.compile compile the same block again and again?"""
    total, again = _total(rows), [row for row in rows if row.compile_reasons]
    reasons: dict[str, int] = {}
    for row in again:
        for reason, count in row.compile_reasons.items():
            reasons[reason] = reasons.get(reason, 0) + count
    num, seconds = sum(reasons.values()), sum(row.compile_seconds for row in again)
    made = sum(row.num_compiled for row in rows)
    line = f"torch.compile: {made} graphs, {num} of them for what was compiled before"
    if num <= RECOMPILES:
        return line, None
    share = seconds / total if total else 0.0
    remedies = []
    shapes = sorted(set(sizes.with_padding)) if sizes else []
    longest = max(sizes.without) if sizes else 0
    if len(shapes) > 1 and longest > infra.micro_batch_tokens:
        remedies.append(
            f"infra.micro_batch_tokens={_up(longest)} pads all rows to one shape: rows of {len(shapes)} shapes, up to "
            f"{longest} tokens, were seen, because some do not fit {infra.micro_batch_tokens}"
        )
    remedies.append("infra.compile=false runs the blocks as they are")
    common = sorted(reasons.items(), key=lambda entry: -entry[1])[:3]
    return line, Finding(
        kind="recompiles",
        seen=f"blocks were compiled again {num} times, in {seconds:.1f} s; after "
        f"{torch._dynamo.config.recompile_limit} graphs torch gives up on a block and runs it as it is",
        remedies=tuple(remedies),
        cost_share=min(1.0, share),
        details=tuple(f"{count} times: {reason}" for reason, count in common),
        facts={"recompiles": num, "seconds": seconds, "shapes": shapes},
    )


def host_syncs(rows: list[Vitals], num_micro_batches: float) -> Looked:
    """Does the CPU wait for the GPU more often than a step must? One step of each row was watched."""
    watched = [row.host_syncs for row in rows if row.host_syncs]
    if not watched:
        return "waiting for the GPU: not on CUDA, or none", None
    a_step = sum(sum(row.values()) for row in watched) / len(watched)
    allowed = SYNCS_A_STEP + SYNCS_A_MICRO_BATCH * num_micro_batches
    line = f"waiting for the GPU: {a_step:.0f} times a step of {num_micro_batches:.0f} micro-batches"
    if a_step <= allowed:
        return line, None
    places: dict[str, float] = {}
    for row in watched:
        for place, count in row.items():
            places[place] = places.get(place, 0.0) + count / len(watched)
    worst = sorted(places.items(), key=lambda entry: -entry[1])[:5]
    return line, Finding(
        kind="host syncs",
        seen=f"the CPU waits for the GPU {a_step:.0f} times a step, {a_step / num_micro_batches:.1f} times a "
        f"micro-batch; at most {allowed:.0f} are a step's own",
        remedies=(
            "infra.micro_batch_tokens: twice as many make half as many micro-batches, and waits, where memory allows",
            "take the read (.item(), .tolist(), print of a tensor) out of the place that waits most, if it is yours",
        ),
        details=tuple(f"{count:.0f} a step at {place}" for place, count in worst),
        facts={"syncs_a_step": a_step, "micro_batches_a_step": num_micro_batches, "places": dict(worst)},
    )


def padding_waste(rows: list[Vitals], infra: Infra, sizes: Sizes, would_be: Sizes | None) -> Looked:
    """How much of what is computed is padding? `would_be`: the sizes with the micro-batch that `better` names."""
    share = sizes.padding_share
    line = f"padding: {share:.0%} of the tokens computed, in {sizes.num_steps} steps sampled"
    if share < PADDING_SHARE:
        return line, None
    total = _total(rows)
    cost = share * _spent(rows, "forward_backward") / total if total else share
    remedies = []
    if would_be is not None and would_be.padding_share < 0.8 * share:
        remedies.append(f"infra.micro_batch_tokens={better(sizes)} leaves {would_be.padding_share:.0%} padding")
    remedies.append("infra.compile=false needs no padding")
    row = padding(infra)["pad_to"]  # only a compiled run has this finding: others are compared with themselves
    return line, Finding(
        kind="padding",
        seen=f"{share:.0%} of the tokens that pass through the model are padding: micro-batches of "
        f"{min(sizes.without)} to {max(sizes.without)} tokens are filled up to {row}",
        remedies=tuple(remedies),
        cost_share=cost,
        facts={"share": share, "row_tokens": row},
    )


def sizes_of(padded: Dataset[StepBatch], plain: Dataset[StepBatch], last_step: int) -> Sizes:
    """Of up to SAMPLED_STEPS steps, evenly spread over the first `last_step`; `plain` are the same without padding."""
    count = min(SAMPLED_STEPS, last_step)
    steps = [number * last_step // count for number in range(count)]

    def tokens(of: Dataset[StepBatch]) -> list[int]:
        return [micro_batch.packed.num_tokens for step in steps for micro_batch in of[step].micro_batches]

    return Sizes(tokens(padded), tokens(plain), count)


def better(sizes: Sizes) -> int:
    """The fewest `infra.micro_batch_tokens` that hold every micro-batch as it is."""
    return _up(max(sizes.without))


def _up(tokens: int) -> int:
    """To a whole number of 128, as `padding` does."""
    return -(-tokens // 128) * 128


def _total(rows: list[Vitals]) -> float:
    return sum(sum(row.seconds.values()) for row in rows)


def _spent(rows: list[Vitals], name: str) -> float:
    return sum(row.seconds.get(name, 0.0) for row in rows)


def _milliseconds(seconds: float) -> str:
    return f"{1000 * seconds:.1f} ms"
