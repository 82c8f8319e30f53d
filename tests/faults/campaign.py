"""A campaign of kills: runs that are killed several times each, and compared with the uninterrupted one at their end.

Where a kill comes is drawn from a seeded generator: a phase, one of its next extents (an evaluation, a save, ...), and
a call in it: any call, or the first at a place in the code, or one that writes, with equal chances.
"""

import json
import shutil
import signal
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

from tests.faults import forkserver
from tests.faults.compare import assert_runs_equal, assert_same_order
from tests.faults.moments import PHASES, Extent, Moment

OUTSIDE = "from outside"
"""In the place of a phase: a SIGKILL by another process after a random time, wherever the process is then."""
OUTSIDE_WITHIN_S = 1.5
"""What such a run takes, about: one that is finished before its kill comes does not count."""
LONGEST_CHAIN = 6
STEPS_AHEAD = 4
"""A kill comes at most so many steps after the last checkpoint, where that is possible: a run has room for several."""


@dataclass(frozen=True)
class Original:
    """An uninterrupted run, and what a killed one begins with."""

    name: str
    """The experiment's."""
    overrides: tuple[str, ...]
    beginning: Path
    """A working directory before the run."""
    end: Path
    """The same directory after it."""
    extents: list[Extent]


@dataclass
class Kills:
    """How many kills were done."""

    done: Counter[tuple[str, str]] = field(default_factory=Counter)
    """By experiment and phase."""
    from_outside: Counter[str] = field(default_factory=Counter)
    """Those among them that came from another process, by phase."""
    runs: Counter[int] = field(default_factory=Counter)
    """Runs, by how often each was killed."""

    def count(self, phase: str) -> int:
        return sum(count for (_, found), count in self.done.items() if found == phase)

    def table(self) -> list[str]:
        names = sorted({name for name, _ in self.done})
        lines = [f"{'phase':28}" + "".join(f"{name:>21}" for name in [*names, "together", "from outside"])]
        for phase in PHASES:
            counts = [*(self.done[name, phase] for name in names), self.count(phase), self.from_outside[phase]]
            lines.append(f"{phase:28}" + "".join(f"{count:21}" for count in counts))
        runs = ", ".join(f"{count} with {number}" for number, count in sorted(self.runs.items()))
        return [*lines, f"{self.done.total()} kills, {self.from_outside.total()} of them from outside; runs: {runs}"]


def uninterrupted(name: str, overrides: tuple[str, ...], beginning: Path, end: Path) -> Original:
    """Run to the end, once."""
    shutil.copytree(beginning, end, symlinks=True)
    code = forkserver.finish(forkserver.start(forkserver.measured, end, overrides))
    assert code == 0, (end / "output.txt").read_text()
    extents = [Extent(**extent) for extent in json.loads((end / "extents.json").read_text())]
    return Original(name, overrides, beginning, end, extents)


def campaign(originals: list[Original], wanted: Counter[str], directory: Path, seed: int) -> Kills:
    """Do the kills that are `wanted` by phase (or `OUTSIDE`), spread over `originals`; raises for the first difference.

    A kill whose moment does not come raises AssertionError, too.
    """
    random, kills = Random(seed), Kills()
    waiting = list(wanted.elements())
    random.shuffle(waiting)
    number = 0
    while waiting:
        original, length = originals[number % len(originals)], random.randint(1, LONGEST_CHAIN)
        phases, waiting = sorted(waiting[:length], key=_place_in_chain), waiting[length:]
        waiting += chain(original, phases, directory / str(number), random, kills)
        number += 1
    return kills


def chain(original: Original, phases: list[str], directory: Path, random: Random, kills: Kills) -> list[str]:
    """One run with a kill in each of `phases`, continued to its end and compared; returns the phases it had not."""
    shutil.copytree(original.beginning, directory, symlinks=True)
    done, left = [], []
    for phase in phases:
        if phase == OUTSIDE:
            found = kill_from_outside(original, directory, random)
            kills.from_outside.update([found] if found else [])
        else:
            moment = draw(original, directory, phase, random)
            found = kill(original, directory, moment) if moment else None
        if found:
            kills.done[original.name, found] += 1
        (done if found else left).append(phase)
    try:
        code = forkserver.finish(forkserver.start(forkserver.train, directory, original.overrides))
        assert code == 0, (directory / "output.txt").read_text()
        assert_runs_equal(original.end, directory, original.name)
        assert_same_order(original.end, directory)
    except AssertionError as error:
        error.add_note(f"after kills {done}, see kills.jsonl and output.txt in {directory}")
        raise
    kills.runs[len(done)] += 1
    shutil.rmtree(directory)
    return left


def draw(original: Original, directory: Path, phase: str, random: Random) -> Moment | None:
    """A moment of `phase` in the next process on this run; None where that process does not come to this phase."""
    if list((directory / "outputs" / original.name).glob("*/version.json")):  # the last kill came when all was done
        return None
    saved = newest_step(directory, original.name)
    ahead = [extent for extent in original.extents if extent.phase == phase and not 0 < extent.step <= saved]
    if phase == "ending":
        ahead = [extent for extent in original.extents if extent.phase == phase]
    if not ahead:
        return None
    soon = [extent for extent in ahead if extent.step <= saved + STEPS_AHEAD] or ahead[:1]
    number = random.randrange(len(soon))
    kind = random.choice([kind for kind, count in soon[number].calls.items() if count])
    return Moment(phase, number + 1, kind, random.randint(1, soon[number].calls[kind]))


def kill(original: Original, directory: Path, moment: Moment) -> str:
    """Run until `moment`; returns its phase."""
    proofs = directory / "kills.jsonl"
    before = proofs.read_text() if proofs.exists() else ""
    code = forkserver.finish(forkserver.start(forkserver.train, directory, original.overrides, moment))
    assert code == -signal.SIGKILL, f"{moment} did not come ({code}): {(directory / 'output.txt').read_text()}"
    proof = json.loads(proofs.read_text().removeprefix(before))
    assert (proof["phase"], phase_of(directory)) == (moment.phase, moment.phase)
    return moment.phase


def kill_from_outside(original: Original, directory: Path, random: Random) -> str | None:
    """Start the command and kill it after a random time; returns its phase then, or None where it was in none."""
    (directory / "phase").unlink(missing_ok=True)
    process = forkserver.start(forkserver.train, directory, original.overrides)
    time.sleep(random.uniform(0, OUTSIDE_WITHIN_S))
    process.kill()
    code = forkserver.finish(process)
    assert code in (-signal.SIGKILL, 0), (directory / "output.txt").read_text()
    found = phase_of(directory)
    return found if code and found in PHASES else None


def phase_of(directory: Path) -> str:
    """Where the last process in `directory` was when it ended."""
    file = directory / "phase"
    return file.read_text().strip() if file.exists() else "not begun"


def newest_step(directory: Path, name: str) -> int:
    """The step of the newest checkpoint; 0 where there is none."""
    saved = (directory / "outputs" / name).glob("*/checkpoints/step-*[0-9]")
    return max((int(path.name.removeprefix("step-")) for path in saved), default=0)


def _place_in_chain(phase: str) -> int:
    """The first preparation and the ending happen once in a run: kills in them come first and last."""
    return {"preparation": 0, "ending": 2}.get(phase, 1)
