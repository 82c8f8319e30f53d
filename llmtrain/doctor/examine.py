"""All that the doctor looks at in one run."""

from pathlib import Path
from statistics import median

from llmtrain.doctor import sick, slow
from llmtrain.doctor.findings import Examination, Finding
from llmtrain.doctor.opened import OpenedRun, open_run
from llmtrain.doctor.rescore import Judge, Scored, can_be_rebuilt, here, indices_of
from llmtrain.doctor.rows import Names, steps_of
from llmtrain.errors import LLMTrainError
from llmtrain.training.batches import PairSteps, TextSteps
from llmtrain.training.checkpoints import step_of
from llmtrain.training.origin import Origin
from llmtrain.training.resolve import Inputs

MOST_SPIKES, MOST_ROWS = 3, 3
"""Spikes that are traced to their rows, and rows that are named of each."""


def examine(directory: Path, rescore: bool = True) -> Examination:
    """Look at the run in `directory`; without `rescore` no weights are loaded, and rows that make a spike stay unnamed.

    Raises UserError where it is no run, TryAgain where there is nothing yet, IntegrityError where a file is damaged.
    """
    run = open_run(directory)
    notes: list[str] = []
    inputs: Inputs | None = None
    try:
        inputs = run.inputs()
    except LLMTrainError as error:
        notes.append(f"rows are not named and padding is not counted: {error}")
    looked = [*_speed(run, inputs), *_losses(run, inputs, rescore, notes)]
    order = {"not finite": 0, "divergence": 1, "loss spike": 2}
    findings = [finding for _, found in looked for finding in found]
    findings.sort(key=lambda finding: (order.get(finding.kind, 3), -(finding.cost_share or 0.0)))
    return Examination(
        str(directory), run.state, tuple(line for line, _ in looked if line), tuple(notes), tuple(findings)
    )


Looked = tuple[str, list[Finding]]


def _speed(run: OpenedRun, inputs: Inputs | None) -> list[Looked]:
    rows, frozen, infra = run.rows, run.frozen, run.frozen.config.infra
    if not rows:
        return []
    found = [slow.data_stall(rows, frozen), *slow.between_steps(rows, frozen)]
    sizes = None
    if inputs is not None:
        plain = steps_of(frozen, inputs, run.outputs, infra.model_copy(update={"compile": False}))
        padded = steps_of(frozen, inputs, run.outputs, infra)
        sizes = slow.sizes_of(padded, plain, run.last_step)
        would_be = None
        if sizes.padding_share:
            other = infra.model_copy(update={"micro_batch_tokens": slow.better(sizes)})
            plain = steps_of(frozen, inputs, run.outputs, other.model_copy(update={"compile": False}))
            would_be = slow.sizes_of(steps_of(frozen, inputs, run.outputs, other), plain, run.last_step)
        found.append(slow.padding_waste(rows, infra, sizes, would_be))
    if infra.compile:
        found.append(slow.recompiles(rows, infra, sizes))
    num_micro_batches = len(sizes.without) / sizes.num_steps if sizes else 1.0
    found.append(slow.host_syncs(rows, num_micro_batches))
    return [(line, [finding] if finding else []) for line, finding in found]


def _losses(run: OpenedRun, inputs: Inputs | None, rescore: bool, notes: list[str]) -> list[Looked]:
    frozen = run.frozen
    names = None
    if inputs is not None:
        names = Names(steps_of(frozen, inputs, run.outputs, here(frozen.config.infra)), inputs, run.outputs)
    looked: list[Looked] = []
    if run.sickness is not None:
        details = _origin_rows(run.sickness.origin, names)
        finding = sick.not_finite(run.sickness, frozen, details)
        looked.append((f"a loss or gradient that is not finite: step {run.sickness.step}", [finding]))
    else:
        looked.append(("losses and gradients that are not finite: none", []))
    spikes = sick.spikes(run.rows)
    num_steps = sum(len(row.losses) for row in run.rows)
    line = f"losses of {num_steps} steps: {sum(map(len, spikes))} above {sick.ROBUST_Z:.0f} robust deviations"
    if spikes and rescore and not can_be_rebuilt(frozen):
        notes.append("the rows of a spike are not judged: adapter=qlora needs CUDA")
        rescore = False
    findings = []
    for group in spikes[:MOST_SPIKES]:
        spike = sick.worst(group)
        if len(group) >= sick.FEWEST:
            findings.append(sick.divergence(group, frozen))
            continue
        evidence: tuple[list[str], list[str]] = ([], [])
        if rescore and inputs is not None and names is not None:
            evidence = _spike_rows(run, inputs, names, spike.step)
        findings.append(sick.spike_finding(spike, frozen, *evidence))
    if len(spikes) > MOST_SPIKES:
        notes.append(f"{len(spikes) - MOST_SPIKES} smaller spikes: steps "
                     f"{', '.join(str(group[0].step) for group in spikes[MOST_SPIKES:][:20])}")  # fmt: skip
    return [*looked, (line, findings)]


def _origin_rows(origin: Origin | None, names: Names | None) -> list[str]:
    """Lines on the rows in which a number was lost."""
    if origin is None or names is None:
        return []
    place = names.at(origin.rows, origin.token) if origin.token is not None else None
    if place is not None:
        members, token = place
        return [f"first at token {token!r} of {member.name}: {member.text}" for member in members]
    lines = [f"row {index}: {member.name}: {member.text}" for index in origin.rows for member in names.members(index)]
    more = len(lines) - MOST_ROWS
    return lines[:MOST_ROWS] + ([f"and {more} more"] if more > 0 else [])


def _spike_rows(run: OpenedRun, inputs: Inputs, names: Names, step: int) -> tuple[list[str], list[str]]:
    """(lines on the rows that made a step's loss, what to do about them)."""
    indices = indices_of(names.steps, step)
    scored, checkpoint = Judge(run, inputs).scored(names, indices, step)
    if checkpoint is None:
        return ["no checkpoint is left to judge its rows by"], []
    usual = median(one.loss for one in scored)
    lines = [_line(one, names) for one in scored[:MOST_ROWS]]
    late = ", for no older ones are left" if step_of(checkpoint) >= step else ""
    lines.append(f"by the weights of {checkpoint.name}{late}; the median of {len(scored)} is {usual:.2f}")
    worst = scored[0]
    outlier = len(scored) > 1 and worst.loss > usual + 2 * max(median(abs(one.loss - usual) for one in scored), 0.25)
    return lines, [_remedy(worst, names)] if outlier else []


def _line(one: Scored, names: Names) -> str:
    if isinstance(names.steps, PairSteps):
        return f"loss {one.loss:.2f}: {one.member.name}: {one.member.text}"
    return f"{one.loss:.2f} nats a token over {one.count}: {one.member.name}: {one.member.text}"


def _remedy(worst: Scored, names: Names) -> str:
    if isinstance(names.steps, TextSteps):
        return f"data.corpus.paths: leave {worst.member.name} out, or correct it"
    setting = "data.pairs.paths" if isinstance(names.steps, PairSteps) else "data.chats.paths"
    return f"{setting}: take {worst.member.name} out of its file, or correct it"
