"""Trackers: who, besides metrics.jsonl, is told the metrics. A training run is one run there for ever."""

from pathlib import Path
from typing import Any, Protocol

from llmtrain.config.tracking import CometTracking, MLflowCometTracking, MLflowTracking, NoTracking, Tracking
from llmtrain.telemetry.comet_tracker import CometService, check_installed
from llmtrain.telemetry.mlflow_tracker import MLflowService
from llmtrain.telemetry.outbox import Outbox, Status, TrackedRun


class Tracker(Protocol):
    """What training tells. Nothing here raises when the tracker fails in the middle of a run."""

    @property
    def tracker_run_id(self) -> str | None:
        """The id of the run in MLflow, by which a registered model names it; None where there is none."""

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Send one row; metrics that the tracker has at this step, or at a later one, are left out."""

    def log_file(self, path: Path) -> None:
        """Send a file, as an artifact of the same name; an older one is replaced."""

    def finish(self, status: Status) -> None:
        """Send what is missing and end the run there; a resume opens it again."""


def check_tracking(tracking: Tracking) -> None:
    """Raises UserError, before anything heavy starts, where the tracker's package is missing."""
    if isinstance(tracking, CometTracking | MLflowCometTracking):
        check_installed(tracking.kind)


def open_tracker(
    tracking: Tracking,
    *,
    outputs: Path,
    experiment: str,
    run_id: str,
    run_directory: Path,
    params: dict[str, Any],
    tags: dict[str, str],
) -> Tracker:
    """The tracker of a run; rows of its metrics.jsonl that the tracker lacks are sent first.

    `params` may be nested. Raises UserError where a run that was never tracked before cannot reach its tracker.
    """
    run = TrackedRun(experiment, run_id, run_directory, params, tags)
    match tracking:
        case NoTracking():
            return Trackers()
        case MLflowTracking():
            return Outbox(MLflowService(tracking, outputs, run), run)
        case CometTracking():
            return Outbox(CometService(tracking, run), run)
        case MLflowCometTracking(mlflow=mlflow, comet=comet):
            return Trackers(Outbox(MLflowService(mlflow, outputs, run), run), Outbox(CometService(comet, run), run))


class Trackers:
    """Any number of trackers as one; each looks after its own failures."""

    def __init__(self, *trackers: Tracker) -> None:
        self._trackers = trackers

    @property
    def tracker_run_id(self) -> str | None:
        return next((tracker.tracker_run_id for tracker in self._trackers if tracker.tracker_run_id), None)

    def log(self, step: int, metrics: dict[str, float]) -> None:
        for tracker in self._trackers:
            tracker.log(step, metrics)

    def log_file(self, path: Path) -> None:
        for tracker in self._trackers:
            tracker.log_file(path)

    def finish(self, status: Status) -> None:
        for tracker in self._trackers:
            tracker.finish(status)
