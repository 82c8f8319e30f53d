"""What stands between training and a tracking service: rows and files wait here until the service has taken them.

Whatever crashes and however often a run is resumed, the service has each metric of a step once. Training never waits
long for it, and never fails by it: what could not be sent is sent later.
"""

import json
import logging
import time
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

from llmtrain.errors import TryAgain, UserError
from llmtrain.telemetry.metrics import METRICS_FILE, read

Status = Literal["FINISHED", "FAILED", "KILLED"]

WAITING_SHARE = 0.1
"""Most of the training time that is spent on attempts to reach a service that fails."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrackedRun:
    """What a tracking service is told of a run when it begins."""

    experiment: str
    run_id: str
    directory: Path
    """The run's, with its metrics.jsonl."""
    params: dict[str, Any]
    """May be nested."""
    tags: dict[str, str]


class Point(NamedTuple):
    """One metric at one step."""

    key: str
    value: float
    step: int
    milliseconds: int
    """Since 1970, UTC."""


class Service(Protocol):
    """A tracking service, as an outbox sees it; all but the properties may raise one of `failures`."""

    name: str
    place: str
    """Where it is, in words."""
    remedy: str
    """What the user can do where it takes no run."""

    @property
    def knows_run(self) -> bool:
        """Whether the run was begun there before."""

    @property
    def mlflow_run_id(self) -> str | None:
        """The id of the run in MLflow; None where there is none."""

    def failures(self) -> tuple[type[Exception], ...]:
        """What it raises when it is away."""

    def open(self) -> dict[str, int]:
        """Begin or continue the run there; returns the last step of each metric that it has."""

    def send(self, points: list[Point]) -> None:
        """Add metrics."""

    def set_status(self, status: Status) -> None:
        """Say how the run ended."""

    def send_file(self, path: Path) -> None:
        """Add a file under its name; an older one is replaced."""

    def close(self) -> None:
        """Finish what goes on in the background; nothing is sent afterwards."""


class Outbox:
    """The `Tracker` of one service."""

    def __init__(self, service: Service, run: TrackedRun) -> None:
        """Rows of metrics.jsonl that the service lacks are sent. Raises UserError where the run cannot be begun."""
        self._service = service
        self._rows = [(_milliseconds(row["time_utc"]), row) for row in read(run.directory / METRICS_FILE)]
        self._files: list[Path] = []
        self._last_steps: dict[str, int] | None = None  # None: not open
        self._warned = False
        self._retry_at = 0.0
        if not service.knows_run:
            try:
                self._last_steps = service.open()
            except service.failures() as error:
                raise UserError(
                    f"{service.name} does not take this run ({service.place}): {_first_line(error)}\n{service.remedy}"
                ) from error
        self._send()

    @property
    def tracker_run_id(self) -> str | None:
        return self._service.mlflow_run_id

    def log(self, step: int, metrics: dict[str, float]) -> None:
        self._rows.append((time.time_ns() // 1_000_000, {**metrics, "step": step}))
        if time.monotonic() >= self._retry_at:
            self._send()

    def log_file(self, path: Path) -> None:
        self._files.append(path)
        if time.monotonic() >= self._retry_at:
            self._send()

    def finish(self, status: Status) -> None:
        self._send(status)
        try:
            self._service.close()
        except self._repairable() as error:
            logger.warning("%s did not take everything: %s", self._service.name, _first_line(error))

    def _send(self, status: Status | None = None) -> None:
        """Send all that waits, in order; on a failure it goes on waiting. What may come twice is left out here."""
        started = time.monotonic()
        try:
            if self._last_steps is None:
                self._last_steps = self._service.open()
            points = self._points(self._last_steps)
            if points:
                self._service.send(points)
            self._last_steps |= {point.key: point.step for point in points}
            self._rows.clear()
            if status is not None:
                self._service.set_status(status)
            while self._files:
                self._service.send_file(self._files[0])
                del self._files[0]
        except self._repairable() as error:
            now = time.monotonic()
            self._retry_at = now + (now - started) / WAITING_SHARE
            self._warn(error)

    def _points(self, last_steps: dict[str, int]) -> list[Point]:
        """The metrics of the waiting rows that are newer than `last_steps`."""
        newest = dict(last_steps)
        points = []
        for milliseconds, row in self._rows:
            for key, value in row.items():
                is_metric = isinstance(value, int | float) and key not in ("step", "seconds")
                if is_metric and row["step"] > newest.get(key, -1):
                    points.append(Point(key, float(value), row["step"], milliseconds))
                    newest[key] = row["step"]
        return points

    def _repairable(self) -> tuple[type[Exception], ...]:
        return (UserError, TryAgain, *self._service.failures())

    def _warn(self, error: Exception) -> None:
        if not self._warned:
            name = self._service.name
            logger.warning("%s fails (%s); training goes on and sends the rows later", name, _first_line(error))
            self._warned = True


def flat(params: dict[str, Any], max_characters: int, prefix: str = "") -> dict[str, str]:
    """Nested settings as the params of a service: {"trainer": {"lr": 0.1}} -> {"trainer.lr": "0.1"}.

    Values that are no strings are written as JSON; what is longer than `max_characters` ends in `...`.
    """
    found: dict[str, str] = {}
    for key, value in params.items():
        if isinstance(value, dict):
            found |= flat(value, max_characters, f"{prefix}{key}.")
        else:
            text = value if isinstance(value, str) else json.dumps(value)
            found[prefix + key] = text if len(text) <= max_characters else text[: max_characters - 3] + "..."
    return found


def _milliseconds(time_utc: str) -> int:
    return round(datetime.fromisoformat(time_utc).timestamp() * 1000)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
