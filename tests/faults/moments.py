"""In a child of the fork server: which phase of the training command the process is in, and death at one moment of it.

    command line            until `resolve` begins
    preparation             in `resolve`: tokenizer, data, the parent found and verified
    start                   from there to the first step: tracker opened, baselines and reference, checkpoint loaded
    in a step               in `training_step`: forward, backward, clipping, optimizer
    after a step            from a step's end to the evaluation, the save or the step that follows, whichever is first
    in validation           in the evaluation between two steps
    in a save               in `AtomicCheckpoints.save_checkpoint`
    between save and evaluation
                            from an evaluation's end to the save or the step that follows it, and from a save's end to
                            the next step: the row written and sent, `best` moved, old checkpoints removed
    ending                  from the fit's end: test split, model/, curves, tracker, registry, journal, version.json

A moment is counted in calls (Python's profiler reports them, of Python and of C), so that a kill can come inside any
function. The process dies as it would by `kill -9` from outside, after a line in `kills.jsonl` has proved the moment.
"""

import hashlib
import json
import os
import signal
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import wraps
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

PHASES = (
    "command line",
    "preparation",
    "start",
    "in a step",
    "after a step",
    "in validation",
    "in a save",
    "between save and evaluation",
    "ending",
)
WRITING = (
    *("write", "write_end_of_file", "serialize_file", "flush", "truncate", "fsync", "flock"),
    *("rename", "symlink", "mkdir", "unlink", "rmdir", "execute", "executemany", "commit"),
)
"""C functions before which a kill finds files, or the database, half done."""


@dataclass(frozen=True)
class Moment:
    """Before call number `number` of a `kind` in the `occurrence`-th extent of `phase` in a process.

    Where the extent has fewer such calls than the measured one had, the kill comes as it ends.
    """

    phase: str
    occurrence: int
    kind: str
    """any: every call; new: those from a line, or of a function, that was not seen before in this extent; writing:
    those of `WRITING`."""
    number: int


@dataclass
class Extent:
    """One uninterrupted stay in a phase."""

    phase: str
    step: int
    """The step it belongs to, from 1; 0 before the first one."""
    calls: dict[str, int] = field(default_factory=lambda: dict.fromkeys(("any", "new", "writing"), 0))
    """How many calls of each kind."""


class Phases:
    """Follows the process through its phases; the file `phase` in the working directory survives its death."""

    def __init__(self) -> None:
        self.file = os.open("phase", os.O_WRONLY | os.O_CREAT)
        self.extent = Extent("", 0)
        self.enter("command line")

    def enter(self, phase: str, step: int | None = None) -> None:
        self.leave()
        self.extent = Extent(phase, self.extent.step if step is None else step)
        os.pwrite(self.file, phase.ljust(40).encode(), 0)
        self.begin()

    def leave(self) -> None:
        """The present extent ends."""

    def begin(self) -> None:
        """A new extent has begun."""

    def within(self, phase: str, function: Callable[..., Any], then: str) -> Callable[..., Any]:
        """`function` as an extent of `phase`, with an extent of `then` after it."""

        @wraps(function)
        def wrapped(*arguments: Any, **named: Any) -> Any:
            self.enter(phase)
            found = function(*arguments, **named)
            self.enter(then)
            return found

        return wrapped


class Counting(Phases):
    """Counts the calls of the present extent, once `sys.setprofile` is given `count`."""

    def begin(self) -> None:
        self.sites: set[tuple[CodeType, int]] = set()

    def count(self, frame: FrameType, event: str, argument: Any) -> None:
        if event not in ("call", "c_call"):
            return
        calls, site = self.extent.calls, (frame.f_code, frame.f_lineno)
        calls["any"] += 1
        if site not in self.sites:
            self.sites.add(site)
            calls["new"] += 1
        if event == "c_call" and argument.__name__ in WRITING:
            calls["writing"] += 1


class Meter(Counting):
    """Measures the extents of an undisturbed process: what moments are drawn from. Written to `extents.json`."""

    def __init__(self) -> None:
        self.extents: list[Extent] = []
        super().__init__()

    def begin(self) -> None:
        super().begin()
        self.extents.append(self.extent)
        sys.setprofile(self.count)

    def leave(self) -> None:
        sys.setprofile(None)

    def write(self) -> None:
        Path("extents.json").write_text(json.dumps([asdict(extent) for extent in self.extents]))


class Killer(Counting):
    """Kills this process at `moment`."""

    def __init__(self, moment: Moment) -> None:
        self.moment, self.seen = moment, Counter[str]()
        super().__init__()

    def begin(self) -> None:
        super().begin()
        self.seen[self.extent.phase] += 1
        if (self.extent.phase, self.seen[self.extent.phase]) == (self.moment.phase, self.moment.occurrence):
            sys.setprofile(self.count)

    def count(self, frame: FrameType, event: str, argument: Any) -> None:
        super().count(frame, event, argument)
        if self.extent.calls[self.moment.kind] == self.moment.number:
            called = argument.__name__ if event == "c_call" else frame.f_code.co_name
            self.kill(f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno} {called}")

    def leave(self) -> None:
        if sys.getprofile() is not None:
            self.kill("the end")

    def kill(self, where: str) -> None:
        sys.setprofile(None)
        with open("kills.jsonl", "a") as file:
            file.write(json.dumps({**asdict(self.moment), "step": self.extent.step, "where": where}) + "\n")
        os.kill(os.getpid(), signal.SIGKILL)


def follow(phases: Phases) -> None:
    """Tell `phases` where the training command is, and write the data of each step to `order.jsonl`."""
    from llmtrain.training import run
    from llmtrain.training.checkpoints import AtomicCheckpoints
    from llmtrain.training.events import Between
    from llmtrain.training.module import TokenClock

    run.resolve = phases.within("preparation", run.resolve, then="start")
    run._fit = phases.within("start", run._fit, then="ending")
    after_save = "between save and evaluation"
    AtomicCheckpoints.save_checkpoint = phases.within("in a save", AtomicCheckpoints.save_checkpoint, then=after_save)
    create, step = Between.__init__, TokenClock.training_step

    def created(between: Between, *arguments: Any, **named: Any) -> None:
        create(between, *arguments, **named)
        between.evaluate = phases.within("in validation", between.evaluate, then=after_save)

    def stepped(module: TokenClock, batch: Any, batch_idx: int) -> None:
        rows = [micro_batch.packed.ids.tolist() for micro_batch in batch.micro_batches]
        with open("order.jsonl", "a") as file:
            sha256 = hashlib.sha256(json.dumps(rows).encode()).hexdigest()
            file.write(json.dumps({"step": module.step + 1, "sha256": sha256}) + "\n")
        for parameter in module.parameters() if batch_idx == 0 else ():
            parameter.register_post_accumulate_grad_hook(_call_in_the_middle_of_backward)
        phases.enter("in a step", module.step + 1)
        step(module, batch, batch_idx)
        phases.enter("after a step")

    Between.__init__, TokenClock.training_step = created, stepped


def _call_in_the_middle_of_backward(parameter: Any) -> None:
    """Backward runs in C++; this call, after each parameter's gradient, is one that the profiler sees."""


def forget_random_state() -> None:
    """The control: checkpoints no longer restore the random generators."""
    from llmtrain.training import module

    module._restore_random_state = lambda state: None
