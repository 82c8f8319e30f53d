"""What an engine is: something that takes run directories and hands back job handles.

A run's directory holds its `config.json`, so an engine needs to know nothing of configs but `infra.launch`, and starts
the same processes everywhere: `python -m llmtrain.cli.rank RUN_DIRECTORY`, once for each rank.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Protocol, runtime_checkable

from llmtrain.config.frozen import FrozenRun, thaw
from llmtrain.config.infra import Infra
from llmtrain.config.launch import AKSLaunch, LocalLaunch, RayLaunch, SlurmLaunch
from llmtrain.errors import UserError

CONFIG = "config.json"

AnyLaunch = LocalLaunch | SlurmLaunch | RayLaunch | AKSLaunch


class State(Enum):
    """How a job stands, as its engine sees it."""

    WAITING = "waiting"
    """In a queue: for the first time, or again after a preemption."""
    RUNNING = "running"
    STOPPING = "stopping"
    ENDED = "ended"
    """Over, well or not: the run's directory says which."""
    UNKNOWN = "unknown"
    """The engine has no memory of it, or could not be asked."""


@dataclass(frozen=True)
class Job:
    """One job as its engine sees it."""

    state: State
    node: str = ""
    """Where it runs or ran."""
    reason: str = ""
    """Why it waits, or how it ended, in the engine's own words."""
    code: int | None = None
    """The exit code, of one that has ended, where the engine knows it."""


@dataclass(frozen=True)
class Run:
    """A frozen run, ready to be submitted."""

    directory: Path
    frozen: FrozenRun

    @property
    def infra(self) -> Infra:
        return self.frozen.config.infra


class Engine(Protocol):
    """Handles are text, and mean something to their engine only."""

    def submit(self, sweep: Path, runs: Sequence[Run]) -> Iterator[tuple[Run, str]]:
        """Submit each run; yields it with its handle as soon as the engine has it. `sweep` is a directory for the
        engine's own files. All runs have one `infra.launch`. Raises UserError where the engine refuses."""
        ...

    def script(self, sweep: Path, runs: Sequence[Run]) -> str:
        """Exactly what `submit` would hand to the engine, for people to read. Submits and writes nothing."""
        ...

    def jobs(self, handles: Sequence[str]) -> dict[str, Job]:
        """How the jobs stand. Never raises for a handle that the engine has forgotten."""
        ...

    def cancel(self, handles: Sequence[str]) -> None:
        """End the jobs; their runs save first where there is time. Nothing happens to those that have ended."""
        ...


@runtime_checkable
class Finds(Protocol):
    """An engine that can say what it holds of a submission that was killed before it said so. Others refuse a run that
    they have, or start it again, and the run's own lock keeps two from computing it."""

    def find(self, sweep: Path, runs: Sequence[Run]) -> dict[Path, str]:
        """The handles of those `runs`, by their directories, that the engine has and that have not ended."""
        ...


@runtime_checkable
class Tells(Protocol):
    """An engine that keeps what a job printed where its run has no log: it did not reach the outputs directory."""

    def log(self, handle: str) -> str:
        """What the newest process of the job has printed; empty where nothing has begun."""
        ...


def engine_of(launch: AnyLaunch) -> Engine:
    """The engine that `infra.launch` means. Raises UserError where its package is missing."""
    match launch:
        case LocalLaunch():
            from llmtrain.launch.local import LocalEngine

            return LocalEngine()
        case SlurmLaunch():
            from llmtrain.launch.slurm import SlurmEngine

            return SlurmEngine(launch)
        case RayLaunch():
            from llmtrain.launch.ray import RayEngine

            return RayEngine(launch)
        case AKSLaunch():
            try:
                from llmtrain.launch.aks import AKSEngine
            except ModuleNotFoundError as error:
                raise UserError(f"infra=aks needs the package {error.name}: pip install 'llmtrain[aks]'") from error
            return AKSEngine(launch)


def run_in(directory: Path) -> Run:
    """The frozen run of a directory. Raises UserError where there is none."""
    return Run(directory, thaw(directory / CONFIG))
