"""`python -m llmtrain.launch.controller SWEEP_DIRECTORY`: asks Optuna, submits, watches, tells, until it is over.

It may be killed at any moment. What it does is written before it is done: a proposal is in Optuna's journal before its
runs are frozen; a run is named by its content, so that freezing it again finds it; its directory is in points.jsonl
before it is submitted; and the engine is asked what it has before a run is submitted again. A verdict is told while the
trial is open, so once. Whoever starts it again goes on from there.
"""

import math
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from optuna.trial import TrialState

from llmtrain.errors import LLMTrainError, RunFailed, TryAgain, UserError
from llmtrain.files import in_words
from llmtrain.launch.engine import Job, Run, State, engine_of, run_in
from llmtrain.launch.figures import figure, logged_bytes, trained_seconds
from llmtrain.launch.freezer import Freezer
from llmtrain.launch.rungs import has_fallen_behind
from llmtrain.launch.search import Controller as Said
from llmtrain.launch.search import SearchDirectory, device_hours, spent, usd
from llmtrain.launch.study import Study
from llmtrain.launch.submit import hand_over, relative
from llmtrain.launch.sweeps import Begun, SweepDirectory, Verdict
from llmtrain.processes import started

POLL_S, POLL_CLUSTER_S = 1.0, 10.0
"""Between two looks: at this machine, and at what others share."""
IDLE_S = 60.0
"""After which the freezer's memory is given back."""
STOP_S = 900.0
"""How long runs that were told to stop may take to save."""


@dataclass
class Live:
    """A point that has no verdict yet."""

    begun: Begun
    runs: list[Run]
    logged: tuple[int, ...] = ()

    def has_new_rows(self) -> bool:
        """Whether a run has logged since this was asked last."""
        before, self.logged = self.logged, tuple(logged_bytes(run.directory) for run in self.runs)
        return self.logged != before


class Controller:
    """One search, from its directory."""

    def __init__(self, place: SearchDirectory, poll_s: float | None = None) -> None:
        self.place, self.searched = place, place.read()
        local = self.searched.config.infra.launch.kind == "local"
        self.poll_s = (POLL_S if local else POLL_CLUSTER_S) if poll_s is None else poll_s
        self.sweep = self.searched.sweep
        self.engine = engine_of(self.searched.config.infra.launch)
        self.study = Study(place.study, self.searched.space, self.sweep)
        self.freezer, self.frozen_at = Freezer(self.searched), time.monotonic()
        self.live: dict[int, Live] = {}
        self.hours_of_ended = 0.0

    def run(self) -> str:
        """Search until it is over or told to stop; returns why it has ended."""
        self._say("")
        try:
            ended = self._search()
        except LLMTrainError as error:
            self._say(f"stopped: {error}; llmtrain jobs resume {self.place.path.name} goes on")
            raise
        finally:
            self.freezer.rest()
        self._say(ended)
        print(ended, flush=True)
        return ended

    def _search(self) -> str:
        self._adopt()
        while True:
            if self.place.stop.exists():
                return self._stop("stopped by a person; llmtrain jobs resume goes on")
            if budget := self._used_up():
                return self._stop(budget)
            why_over = ""
            while len(self.live) < self.sweep.concurrent and not why_over:
                why_over = self._propose()
            if not self.live:
                return why_over
            if time.monotonic() - self.frozen_at > IDLE_S:
                self.freezer.rest()
            time.sleep(self.poll_s)
            self.searched = self.place.read()  # the same command with other limits
            self.sweep = self.searched.sweep
            try:
                self._look()
            except TryAgain as error:  # the engine could not be asked
                print(error, file=sys.stderr, flush=True)

    # ---- beginning points

    def _adopt(self) -> None:
        """Take over what a controller before this one has begun."""
        before = self.place.place.begun()
        given_up = []
        for number in self.study.trials:
            if self.study.is_open(number):
                self._begin(number, before.get(number), first_time=False)
                continue
            begun = before.get(number)
            if begun is None:  # it could not be run, which was told, and killed before it could say so
                begun = self._proposed(number).model_copy(
                    update={"verdict": "failed", "reason": "it could not be run; controller.log says why"}
                )
                self.place.note(begun)
            if begun.verdict is None:  # told, and killed before it could say so
                begun = begun.model_copy(update=self._told(number))
                self.place.note(begun)
            if begun.verdict != "done":
                given_up += list(begun.runs)
            self.hours_of_ended += sum(self._hours(self._outputs / run) for run in begun.runs)
        self._cancel(given_up)
        for number in list(self.live):
            if self.study.judged_again(number):
                self._prune(number)

    def _told(self, number: int) -> dict[str, object]:
        """What the study was told of a point, as points.jsonl says it."""
        state, value = self.study.verdict(number)
        stopped: Verdict = "pruned" if self.study.reported(number) else "failed"  # the worst, where it diverged
        names: dict[TrialState, Verdict] = {TrialState.COMPLETE: "done", TrialState.PRUNED: stopped}
        return {"verdict": names.get(state, "failed"), "value": value}

    def _propose(self) -> str:
        """Begin another point; why there is none, in words, or nothing."""
        if len(self.study.trials) >= self.sweep.trials:
            return "over: every point has been tried"
        number = self.study.ask()
        if number is None:
            return f"over: there are only {len(self.study.trials)} points"
        self._begin(number, None, first_time=True)
        return ""

    def _begin(self, number: int, begun: Begun | None, *, first_time: bool) -> None:
        """Freeze and submit the runs of a point; a config that cannot be is its verdict."""
        if begun is None:
            found = self._proposed(number)
            try:
                runs = [self.freezer([*self.searched.space.fixed, *line]) for line in found.lines]
            except UserError as error:
                self.study.tell_failed(number)
                self.place.note(found.model_copy(update={"verdict": "failed", "reason": str(error)}))
                print(f"point {number}, {' '.join(found.overrides)}: {error}", file=sys.stderr, flush=True)
                return
            finally:
                self.frozen_at = time.monotonic()
            begun = found.model_copy(update={"runs": tuple(run.relative_to(self._outputs).as_posix() for run in runs)})
            self.place.note(begun)
        live = Live(begun, [run_in(self._outputs / run) for run in begun.runs])
        todo = [run for run in live.runs if not _finished(run)]
        with self.place.place.alone():
            hand_over(self.place.place, self.engine, todo, say=_say_now, first_time=first_time)
        self.live[number] = live

    def _proposed(self, number: int) -> Begun:
        """A point as it was proposed, before it has runs."""
        return Begun(
            number=number, overrides=tuple(self.study.overrides(number)), seeds=self.sweep.seeds or (), runs=()
        )

    # ---- watching them

    def _look(self) -> None:
        handles = self.place.place.handles()
        wanted = {handles[name] for live in self.live.values() for name in live.begun.runs if name in handles}
        jobs = self.engine.jobs(sorted(wanted))
        for number, live in list(self.live.items()):
            if all(map(_finished, live.runs)):
                self._done(number)
                continue
            if live.has_new_rows() and has_fallen_behind(self.study, number, live.runs):
                self._prune(number)
                continue
            for run in live.runs:
                job = jobs.get(handles.get(relative(run, self._outputs), ""), Job(State.UNKNOWN))
                if job.state is State.ENDED and not _finished(run):
                    self._failed(number, run, job)
                    break

    # ---- verdicts: Optuna's journal first, then points.jsonl, which `_adopt` makes up for

    def _done(self, number: int) -> None:
        live = self.live[number]
        values = [figure(run.directory, self.sweep.metric) for run in live.runs]
        if any(value is None for value in values):
            self.study.tell_failed(number)
            known = f"no run has a figure '{self.sweep.metric}'; set sweep.metric to a name in metrics.jsonl"
            self._ended(number, "failed", reason=known)
            return
        value = sum(value for value in values if value is not None) / len(values)
        self.study.tell_done(number, value)
        self._ended(number, "done" if math.isfinite(value) else "failed", value)

    def _prune(self, number: int) -> None:
        live = self.live[number]
        self.study.tell_worst(number)
        _, value = self.study.verdict(number)
        self._cancel(list(live.begun.runs))
        reason = f"fell behind at {self.study.reported(number):,} tokens"
        self._ended(number, "pruned", value, reason)

    def _failed(self, number: int, run: Run, job: Job) -> None:
        """A run has ended before its end; where it diverged, the search learns from it."""
        if job.code == RunFailed.exit_code or (run.directory / "sickness.json").exists():
            self.study.tell_worst(number)
        else:
            self.study.tell_failed(number)
        self._cancel(list(self.live[number].begun.runs))
        self._ended(number, "failed", reason=f"{relative(run, self._outputs)}: {job.reason}")

    def _ended(self, number: int, verdict: Verdict, value: float | None = None, reason: str = "") -> None:
        live = self.live.pop(number)
        self.hours_of_ended += sum(self._hours(run.directory) for run in live.runs)
        self.place.note(live.begun.model_copy(update={"verdict": verdict, "value": value, "reason": reason}))
        print(f"point {number}, {' '.join(live.begun.overrides)}: {verdict} {value} {reason}".rstrip(), flush=True)
        self._say("")

    # ---- stopping and limits

    def _stop(self, why: str) -> str:
        """Tell every run to save and stop, and wait for it; the points stay open, for a search that goes on."""
        names = [name for live in self.live.values() for name in live.begun.runs]
        self._cancel(names)
        until = time.monotonic() + STOP_S
        while time.monotonic() < until:
            handles = [handle for name, handle in self.place.place.handles().items() if name in names]
            if all(job.state in (State.ENDED, State.UNKNOWN) for job in self.engine.jobs(handles).values()):
                break
            time.sleep(self.poll_s)
        return why

    def _cancel(self, names: list[str]) -> None:
        handles = self.place.place.handles()
        chosen = [handles[name] for name in names if name in handles]
        jobs = self.engine.jobs(chosen)
        if alive := [handle for handle in chosen if jobs[handle].state not in (State.ENDED, State.UNKNOWN)]:
            self.engine.cancel(alive)

    def _used_up(self) -> str:
        """Which budget is used up, in words; empty while none is."""
        if self.sweep.budget_device_hours is None and self.sweep.budget_usd is None:
            return ""
        hours = self._all_hours()
        money = usd(self.searched.config, hours)
        for limit, used in ((self.sweep.budget_device_hours, hours), (self.sweep.budget_usd, money)):
            if limit is not None and used is not None and used >= limit:
                return f"over: the budget is used up ({spent(self.sweep, self._state(''))}); a larger one goes on"
        return ""

    def _all_hours(self) -> float:
        running = (run.directory for live in self.live.values() for run in live.runs)
        return self.hours_of_ended + sum(map(self._hours, running))

    def _hours(self, directory: Path) -> float:
        return device_hours(self.searched.config, trained_seconds(directory))

    @property
    def _outputs(self) -> Path:
        return self.place.place.outputs

    def _state(self, ended: str) -> Said:
        hours = self._all_hours()
        process = None if ended else (os.getpid(), str(started(os.getpid())))
        return Said(process=process, ended=ended, device_hours=hours, usd=usd(self.searched.config, hours))

    def _say(self, ended: str) -> None:
        self.place.say(self._state(ended))


def _finished(run: Run) -> bool:
    return (run.directory / "version.json").exists()


def _say_now(line: str) -> None:
    print(line, flush=True)


def main(argv: list[str]) -> int:
    """Control the search in the directory that is named. Returns an exit code of `llmtrain.errors`."""
    path = Path(argv[0]).resolve()
    place = SearchDirectory(SweepDirectory(path.parents[1], path.name))
    try:
        searched = place.read()
        if not os.path.samefile(Path(searched.directory, searched.config.outputs_dir), place.place.outputs):
            raise UserError(f"{path} was moved: submit the sweep again, from where its outputs are now")
        os.chdir(searched.directory)
        with place.only_controller():
            Controller(place).run()
    except LLMTrainError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    except OSError as error:
        print(in_words(error) or error, file=sys.stderr)
        return UserError.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
