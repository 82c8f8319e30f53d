"""A run once more, from its directory alone; what is different about the machine and the code, and about the result."""

import os
from dataclasses import dataclass
from pathlib import Path

from llmtrain.artifacts import TrainedModel
from llmtrain.config.frozen import FrozenRun, thaw
from llmtrain.errors import IntegrityError, UserError
from llmtrain.report.records import Processes
from llmtrain.telemetry.metrics import METRICS_FILE, read, without_times
from llmtrain.training import device
from llmtrain.training.machine import machine
from llmtrain.training.resolve import Say, inputs_of, resolve
from llmtrain.training.run import directory_of, finished, freeze, only_process, train_rank

CODE = ("llmtrain", "commit")
HARDWARE = ("CPU", "cores", "threads", "memory", "GPU", "system")
"""Of what a machine is called by; all the rest are versions."""


@dataclass(frozen=True)
class Difference:
    """One thing that is not as it was."""

    kind: str
    """code, versions or hardware."""
    name: str
    before: str
    now: str

    def __str__(self) -> str:
        return f"{self.kind}: {self.name} was {self.before}, is {self.now}"


def rerun(directory: Path, *, force: bool = False, say: Say = print) -> bool:
    """Make the run of `directory` again, as another attempt beside it, in this process or in ranks that it starts.

    Returns whether the result is bit-equal: the weights' hashes, and what metrics.jsonl says but for times. Raises the
    errors of `llmtrain.errors`; UserError where `directory` is no run.
    """
    frozen = _another_attempt(
        thaw(directory / "config.json"), Path(os.path.relpath(directory.resolve().parents[1])), say
    )
    again = directory_of(frozen)
    device.apply(frozen.config.infra)  # threads are part of what is compared
    differences = differences_of(directory)
    say(f"{directory} again, as {again}")
    _say_differences(differences, say)
    with only_process(again, "launcher.lock"):
        freeze(frozen, force=force)
        if frozen.config.infra.ranks > 1:
            from llmtrain.training.ranks.torchrun import run_ranks

            run_ranks(again, frozen.config.infra.ranks)
        else:
            train_rank(again)
    return compare(directory, again, say)


def differences_of(directory: Path) -> list[Difference]:
    """What of this machine and this llmtrain is not as the last process of a run recorded it; none where it recorded
    nothing."""
    path = directory / "processes.json"
    processes = Processes.read(path).processes if path.exists() else ()
    before, now = (processes[-1].machine if processes else {}), machine()
    found = []
    for name in {**before, **now} if before else ():
        kind = "code" if name in CODE else "hardware" if name in HARDWARE else "versions"
        if before.get(name) != now.get(name):
            found.append(Difference(kind, name, before.get(name, "not there"), now.get(name, "not there")))
    return found


def compare(first: Path, second: Path, say: Say) -> bool:
    """Say whether two runs of the same mathematics came to the same result, and where they part. Returns whether."""
    records = [directory / "trained.json" for directory in (first, second)]
    if not records[0].exists():
        say(f"{first} has not finished: there is no result to compare with")
        return False
    one, other = (TrainedModel.read(record) for record in records)
    rows = [[without_times(row) for row in read(directory / METRICS_FILE)] for directory in (first, second)]
    parted = next((pair[0] for pair in zip(*rows, strict=False) if pair[0] != pair[1]), None)
    if one.weights_sha256 == other.weights_sha256 and parted is None and len(rows[0]) == len(rows[1]):
        say(f"bit-equal: weights {one.weights_sha256[:12]}, and {len(rows[0])} rows of metrics")
        return True
    same = "equal" if one.weights_sha256 == other.weights_sha256 else "different"
    say(f"not bit-equal: weights {same} ({one.weights_sha256[:12]} and {other.weights_sha256[:12]})")
    if parted is not None:
        say(f"the metrics part at step {parted['step']}, {parted['tokens']:,} tokens")
    for name in sorted(one.metrics.keys() & other.metrics.keys()):
        if one.metrics[name] != other.metrics[name]:
            say(f"  {name}: {one.metrics[name]:.6g} before, {other.metrics[name]:.6g} now")
    return False


def _another_attempt(frozen: FrozenRun, outputs: Path, say: Say) -> FrozenRun:
    """The next attempt that is not finished, with all that it reads; what was cleared away is prepared again."""
    config = frozen.config.model_copy(update={"outputs_dir": str(outputs)})
    frozen = frozen.model_copy(update={"config": config, "attempt": frozen.attempt + 1})
    while finished(directory_of(frozen)):
        frozen = frozen.model_copy(update={"attempt": frozen.attempt + 1})
    try:
        inputs_of(frozen, outputs)
    except IntegrityError as gone:
        found, _ = resolve(config, outputs, _no_base, say)
        if found.resolved != frozen.resolved:
            raise UserError(f"{gone}\nand what is prepared now is not the same: the run cannot be made again") from gone
    return frozen


def _no_base() -> TrainedModel:
    raise UserError("the model that this run started from is gone, and is not trained anew; restore it")


def _say_differences(differences: list[Difference], say: Say) -> None:
    if not differences:
        say("the same code, versions and hardware, as far as the run has recorded them")
    for one in differences:
        say(str(one))
    if any(one.name == "commit" for one in differences) or "+ changes" in machine().get("commit", ""):
        say("note: changes that were not committed are not recorded")
