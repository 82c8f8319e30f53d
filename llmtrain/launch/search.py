"""The files of a search, beside those of every sweep: what is searched, which points it has begun, how it stands.

    outputs/sweeps/<sweep id>/search.json    what is searched; typed again with other limits, it is replaced
                              study.jsonl    Optuna's own storage: every proposal, figure and verdict
                              points.jsonl   each point's runs, and later its verdict; a line counts once, however often
                              state.json     the controller's process, and why it has ended
                              stop           there while a person wants it to stop

Read by `llmtrain jobs`, which imports no Optuna.
"""

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from llmtrain.config.axes import Space
from llmtrain.config.base import Changes, content_hash
from llmtrain.config.root import TrainConfig
from llmtrain.config.sweep import Search
from llmtrain.errors import IntegrityError, TryAgain
from llmtrain.files import write_whole
from llmtrain.launch.sweeps import POINTS, Begun, SweepDirectory, append_line
from llmtrain.processes import lives

SEARCH, STUDY, STATE, STOP = "search.json", "study.jsonl", "state.json", "stop"
LIMITS = {"trials", "concurrent", "budget_device_hours", "budget_usd"}
"""What may change while a search goes on."""


class Searched(BaseModel):
    """What is searched."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    space: Space
    config: TrainConfig
    """Of one of its points: what all share (`sweep`, `infra.launch`, `outputs_dir`) is read from it."""
    config_dirs: tuple[str, ...]
    config_name: str
    force: bool
    """Whether points begin that will not fit by their plan."""
    directory: str
    """Where the command was typed: relative paths of data are meant from there."""

    @property
    def sweep(self) -> Search:
        sweep = self.config.sweep
        assert sweep.kind != "grid", "a grid is not searched"
        return sweep

    @property
    def sweep_id(self) -> str:
        """8 hex digits of the hash of all but the limits: with more trials, or a larger budget, it is the same one."""
        identity = {
            "axes": [axis.model_dump(mode="json") for axis in self.space.axes],
            "config": self.config.fields_that_change(Changes.MATHEMATICS, Changes.DATA),
            "name": self.config.name,
            "engine": self.config.infra.launch.kind,
            "sweep": self.sweep.model_dump(mode="json", exclude=LIMITS),
        }
        return content_hash(identity)[:8]


class Controller(BaseModel):
    """How a search stands."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    process: tuple[int, str] | None
    """pid and start time of the controller; None once it has ended."""
    ended: str
    """Why; empty while it has not."""
    device_hours: float
    usd: float | None


class SearchDirectory:
    """The files of one search."""

    def __init__(self, place: SweepDirectory) -> None:
        self.place, self.path = place, place.path

    @property
    def exists(self) -> bool:
        return (self.path / SEARCH).exists()

    def write(self, searched: Searched) -> None:
        self.path.mkdir(parents=True, exist_ok=True)
        write_whole(self.path / SEARCH, searched.model_dump_json(indent=2) + "\n")

    def read(self) -> Searched:
        """Raises IntegrityError where it is damaged."""
        try:
            return Searched.model_validate_json((self.path / SEARCH).read_bytes())
        except ValueError as error:
            raise IntegrityError(f"{self.path / SEARCH} is damaged: {error}; submit the sweep again") from error

    def note(self, point: Begun) -> None:
        """Keep a point, or what has become of it; on disk when this returns."""
        append_line(self.path / POINTS, point.model_dump_json())

    def say(self, state: Controller) -> None:
        write_whole(self.path / STATE, state.model_dump_json(indent=2) + "\n")

    def state(self) -> Controller | None:
        path = self.path / STATE
        return Controller.model_validate_json(path.read_bytes()) if path.exists() else None

    @property
    def searching(self) -> bool:
        """Whether its controller lives."""
        state = self.state()
        return state is not None and state.process is not None and lives(state.process)

    @property
    def study(self) -> Path:
        return self.path / STUDY

    @property
    def stop(self) -> Path:
        return self.path / STOP

    @contextmanager
    def only_controller(self) -> Iterator[None]:
        """Raises TryAgain where another one works on this search; the lock goes with its process, however it ends."""
        with (self.path / "controller.lock").open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise TryAgain(f"{self.path}: another controller works on this search") from error
            yield


def in_words(place: SearchDirectory) -> str:
    """How the search stands, in a line."""
    searched, points, state = place.read(), place.place.begun().values(), place.state()
    counts = {verdict: sum(point.verdict == verdict for point in points) for verdict in ("done", "pruned", "failed")}
    said = [f"{searched.sweep.kind}: {len(points)} of {searched.sweep.trials} points begun"]
    said += [f"{count} {verdict}" for verdict, count in counts.items() if count]
    if best := best_of(searched.sweep, list(points)):
        said.append(f"best {searched.sweep.metric} {best.value:.4f} (point {best.number})")
    if state is not None:
        said.append(spent(searched.sweep, state))
    if state is not None and state.ended:
        said.append(state.ended)
    elif not place.searching:
        said.append(f"its controller has gone: llmtrain jobs resume {place.path.name}")
    return ", ".join(said)


def spent(sweep: Search, state: Controller) -> str:
    """Device-hours and money so far, beside their limits."""
    limit = f" of {sweep.budget_device_hours:g}" if sweep.budget_device_hours else ""
    text = f"{state.device_hours:.3g}{limit} device-hours"
    if state.usd is not None:
        text += f", {state.usd:.2f}" + (f" of {sweep.budget_usd:g}" if sweep.budget_usd else "") + " US dollars"
    return text


def best_of(sweep: Search, points: list[Begun]) -> Begun | None:
    """The point with the best figure among those that came to their end."""
    done = [point for point in points if point.verdict == "done" and point.value is not None]
    sign = 1 if sweep.direction == "min" else -1
    return min(done, key=lambda point: sign * (point.value or 0.0), default=None)


def device_hours(config: TrainConfig, seconds: float) -> float:
    """Ranks x hours of a run that trained for `seconds`."""
    return config.infra.ranks * seconds / 3600


def usd(config: TrainConfig, hours: float) -> float | None:
    """US dollars for `hours` device-hours; None where no price is given. A measured machine is paid as a whole."""
    hardware = config.infra.hardware
    if hardware.price_per_hour is None:
        return None
    return hardware.price_per_hour * (hours / config.infra.ranks if hardware.kind == "measured" else hours)
