"""Optuna, asked and told: proposals, figures and verdicts live in its own journal, `study.jsonl` of the sweep.

A proposal is whole once its trial has the attribute `point`; what a kill left before that is told as failed and
proposed again. Each point has a random generator of its own, seeded by the sweep's seed and the point's number: a
controller that begins again would else draw what was drawn before.
"""

import fcntl
import logging
import math
import os
from collections.abc import Container, Iterator
from copy import copy
from pathlib import Path
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.pruners import SuccessiveHalvingPruner
from optuna.samplers import BaseSampler, RandomSampler, TPESampler
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.storages.journal._file import BaseJournalFileLock
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, Trial, TrialState

from llmtrain.config.axes import Axis, Interval, Space
from llmtrain.config.base import content_hash
from llmtrain.config.sweep import ASHASweep, Search, TPESweep

POINT, WENT_ON = "point", "went_on"
NAME = "search"
TRIES = 1000
"""Proposals for one point that were all tried before: the search knows no other."""


class Study:
    """The proposals of one search. One process at a time: the caller holds a lock."""

    def __init__(self, path: Path, space: Space, sweep: Search) -> None:
        logging.getLogger("optuna").setLevel(logging.ERROR)
        self.space, self.sweep = space, sweep
        _cut_torn_line(path)
        storage = JournalStorage(JournalFileBackend(str(path), lock_obj=_Lock(path)))
        self._storage = storage
        self._study = optuna.create_study(
            storage=storage,
            study_name=NAME,
            direction=StudyDirection.MINIMIZE if sweep.direction == "min" else StudyDirection.MAXIMIZE,
            load_if_exists=True,
        )
        if isinstance(sweep, ASHASweep):
            self._study.pruner = SuccessiveHalvingPruner(sweep.rung_tokens, sweep.reduction)
        self.trials: dict[int, FrozenTrial] = {}
        """By the number of the point, as they were when the study was opened or asked."""
        for trial in self._study.get_trials(deepcopy=False):
            if POINT in trial.user_attrs:
                self.trials[trial.user_attrs[POINT]] = trial
            elif trial.state == TrialState.RUNNING:
                self._study.tell(trial.number, state=TrialState.FAIL)
        self._tried = {content_hash(trial.params) for trial in self.trials.values()}
        self._reported = {number: trial.last_step or 0 for number, trial in self.trials.items()}

    def ask(self) -> int | None:
        """Propose a point that was not there before, and keep it; returns its number, None where there is none left."""
        number, size = len(self.trials), self.space.size
        if size is not None and number >= size:
            return None
        for attempt in range(TRIES):
            self._study.sampler = self._sampler(number, attempt)
            trial = self._study.ask({axis.key: _distribution(axis) for axis in self.space.axes})
            if (identity := content_hash(trial.params)) in self._tried:
                self._study.tell(trial.number, state=TrialState.FAIL)
                continue
            trial.set_user_attr(POINT, number)
            self._tried.add(identity)
            self.trials[number], self._reported[number] = self._storage.get_trial(trial._trial_id), 0
            return number
        return None

    def overrides(self, number: int) -> list[str]:
        """The overrides of a point, one for each axis."""
        params = self.trials[number].params
        return [f"{axis.key}={_text(axis, params[axis.key])}" for axis in self.space.axes]

    def is_open(self, number: int) -> bool:
        """Whether the point has no verdict yet."""
        return self._trial(number).state == TrialState.RUNNING

    def verdict(self, number: int) -> tuple[TrialState, float | None]:
        """What the study was told of a point."""
        trial = self._trial(number)
        return trial.state, trial.value if trial.values else None

    # ---- figures on the way, for ASHA

    def rungs(self, total_tokens: int) -> Iterator[int]:
        """The tokens at which points are compared, before the end of a run."""
        if isinstance(self.sweep, ASHASweep):
            tokens = self.sweep.rung_tokens
            while tokens < total_tokens:
                yield tokens
                tokens *= self.sweep.reduction

    def reported(self, number: int) -> int:
        """The tokens of the last figure that was reported of a point; 0 before the first."""
        return self._reported[number]

    def report(self, number: int, tokens: int, value: float) -> bool:
        """Keep a figure of a point that has passed a rung; whether it is hopeless."""
        trial = Trial(self._study, self.trials[number]._trial_id)
        trial.report(value, tokens)
        self._reported[number] = tokens
        if trial.should_prune():
            return True
        trial.set_user_attr(WENT_ON, tokens)
        return False

    def judged_again(self, number: int) -> bool:
        """Whether a point is hopeless whose last figure was reported, and the verdict lost in a kill."""
        trial = copy(self._trial(number))
        if trial.last_step is None or trial.user_attrs.get(WENT_ON) == trial.last_step:
            return False
        judged = [name for name in trial.system_attrs if name.startswith("completed_rung_")]
        if judged:  # as it was before
            last = max(judged, key=lambda name: int(name.rpartition("_")[2]))
            trial.system_attrs = {name: value for name, value in trial.system_attrs.items() if name != last}
        return self._study.pruner.prune(_View(self._study, trial), trial)

    # ---- verdicts

    def tell_done(self, number: int, value: float) -> None:
        if math.isfinite(value):
            self._study.tell(self.trials[number].number, value)
        else:
            self.tell_worst(number)

    def tell_worst(self, number: int) -> None:
        """Stopped, or diverged: the search learns to go elsewhere."""
        self._study.tell(self.trials[number].number, state=TrialState.PRUNED)

    def tell_failed(self, number: int) -> None:
        """It says nothing about the point."""
        self._study.tell(self.trials[number].number, state=TrialState.FAIL)

    def _trial(self, number: int) -> FrozenTrial:
        """As the study has it now; `Study.get_trials` would list all of them."""
        return self._storage.get_trial(self.trials[number]._trial_id)

    def _sampler(self, number: int, attempt: int) -> BaseSampler:
        seed = int(content_hash([self.sweep.seed, number, attempt])[:8], 16)
        match self.sweep:
            case TPESweep() as tpe if attempt == 0:
                return TPESampler(seed=seed, n_startup_trials=tpe.startup, constant_liar=True)
            case _:
                return RandomSampler(seed=seed)


class _View(optuna.Study):
    """A study in which one trial is another."""

    def __init__(self, study: optuna.Study, trial: FrozenTrial) -> None:
        vars(self).update(vars(study))
        self._other = trial

    def get_trials(self, deepcopy: bool = True, states: Container[TrialState] | None = None) -> list[FrozenTrial]:
        trials = super().get_trials(deepcopy=deepcopy, states=states)
        return [self._other if trial.number == self._other.number else trial for trial in trials]


class _Lock(BaseJournalFileLock):
    """Of the journal: by the kernel, so that a kill leaves none behind; Optuna's own are waited for half a minute."""

    def __init__(self, path: Path) -> None:
        self._path, self._descriptor = path.with_suffix(".lock"), -1

    def acquire(self) -> bool:
        self._descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o644)
        fcntl.flock(self._descriptor, fcntl.LOCK_EX)
        return True

    def release(self) -> None:
        os.close(self._descriptor)


def _cut_torn_line(path: Path) -> None:
    """Take away what a kill or a power cut left of a last line: Optuna would append to it, and read neither."""
    if path.exists() and (content := path.read_bytes()) and not content.endswith(b"\n"):
        with path.open("r+b") as file:
            file.truncate(content.rfind(b"\n") + 1)


def _distribution(axis: Axis) -> BaseDistribution:
    match axis:
        case Interval() if axis.whole:
            return IntDistribution(int(axis.low), int(axis.high), log=axis.log)
        case Interval():
            return FloatDistribution(axis.low, axis.high, log=axis.log)
        case _ if axis.ordered:
            return IntDistribution(0, len(axis.values) - 1)
        case _:
            return CategoricalDistribution(axis.values)


def _text(axis: Axis, value: Any) -> str:
    if isinstance(axis, Interval):
        return axis.text(value)
    return axis.values[value] if axis.ordered else str(value)
