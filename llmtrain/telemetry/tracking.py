"""Trackers: who, besides metrics.jsonl, is told the metrics.

A training run has one MLflow run for ever, whatever crashes and however often it is resumed, and each metric has each
step once. Training never waits long for a tracker, and never fails by one: what could not be sent is sent later.
"""

import json
import logging
import time
from datetime import datetime
from pathlib import Path
from shutil import copyfile
from typing import TYPE_CHECKING, Any, Literal, Protocol

from llmtrain.config.tracking import MLflowTracking, NoTracking, Tracking
from llmtrain.errors import UserError
from llmtrain.files import fsync, write_whole
from llmtrain.telemetry.database import ARTIFACT_ROOT, artifacts_directory, failures, open_client, open_database
from llmtrain.telemetry.metrics import METRICS_FILE, read

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

Status = Literal["FINISHED", "FAILED", "KILLED"]

RUN_TAG = "llmtrain.run_id"
"""Tag of the MLflow run with our run id."""
ID_FILE = "mlflow_run_id"
"""File in the run's directory with the MLflow run's id."""
MAX_PARAM_CHARACTERS = 6000
MAX_PARAMS_PER_BATCH = 100
MAX_METRICS_PER_BATCH = 1000
WAITING_SHARE = 0.1
"""Most of the training time that is spent on attempts to reach a tracker that fails."""

logger = logging.getLogger(__name__)


class Tracker(Protocol):
    """What training tells. Nothing here raises when the tracker fails in the middle of a run."""

    @property
    def tracker_run_id(self) -> str | None:
        """The run's id at the tracker."""

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Send one row; metrics that the tracker has at this step, or at a later one, are left out."""

    def log_file(self, path: Path) -> None:
        """Send a file, as an artifact of the same name; an older one is replaced."""

    def finish(self, status: Status) -> None:
        """Send what is missing and end the run there; a resume opens it again."""


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
    match tracking:
        case NoTracking():
            return NoTracker()
        case MLflowTracking(uri=uri):
            return MLflowTracker(uri, outputs, experiment, run_id, run_directory, params, tags)


class NoTracker:
    tracker_run_id = None

    def log(self, step: int, metrics: dict[str, float]) -> None:
        pass

    def log_file(self, path: Path) -> None:
        pass

    def finish(self, status: Status) -> None:
        pass


class MLflowTracker:
    """See `Tracker`. Rows and files wait in `_rows` and `_files` until MLflow has taken them."""

    def __init__(
        self,
        uri: str | None,
        outputs: Path,
        experiment: str,
        run_id: str,
        run_directory: Path,
        params: dict[str, Any],
        tags: dict[str, str],
    ) -> None:
        self._uri, self._outputs, self._experiment = uri, outputs, experiment
        self._run_id, self._params, self._tags = run_id, flat(params), tags
        self._id_file = run_directory / ID_FILE
        self._rows = [(_milliseconds(row["time_utc"]), row) for row in read(run_directory / METRICS_FILE)]
        self._files: list[Path] = []
        self._connection: tuple[MlflowClient, Run] | None = None
        self._last_steps: dict[str, int] = {}
        self._warned = False
        self._retry_at = 0.0
        if self.tracker_run_id is None:
            try:
                self._connect()
            except failures() as error:
                place = uri or f"the database in {outputs / 'mlflow'}"
                raise UserError(
                    f"MLflow does not take this run (tracking.uri: {place}): {_first_line(error)}\n"
                    f"Start the server, correct tracking.uri, or choose tracking=none"
                ) from error
        self._send()

    @property
    def tracker_run_id(self) -> str | None:
        return self._id_file.read_text() if self._id_file.exists() else None

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

    def _send(self, status: Status | None = None) -> None:
        """Send all that waits, in order; on a failure it goes on waiting. MLflow ignores what comes twice."""
        repairable: tuple[type[Exception], ...] = (UserError, *failures())
        started = time.monotonic()
        try:
            client, run = self._connect()
            self._send_rows(client, run.info.run_id)
            if status is not None:
                client.set_terminated(run.info.run_id, status)
            while self._files:
                self._send_file(client, run, self._files[0])
                del self._files[0]
        except repairable as error:
            now = time.monotonic()
            self._retry_at = now + (now - started) / WAITING_SHARE
            if not self._warned:
                logger.warning("MLflow fails (%s); training goes on and sends the rows later", _first_line(error))
                self._warned = True

    def _connect(self) -> "tuple[MlflowClient, Run]":
        """The client and the run; where there was no connection, with the last step of each metric that MLflow has."""
        if self._connection is not None:
            return self._connection
        client = open_database(self._outputs) if self._uri is None else open_client(self._uri)
        run = self._find(client) or self._create(client)
        if run.info.status != "RUNNING":
            client.update_run(run.info.run_id, status="RUNNING")
        self._complete_params(client, run)
        self._last_steps = {
            key: max(metric.step for metric in client.get_metric_history(run.info.run_id, key))
            for key in run.data.metrics
        }
        self._connection = client, run
        return self._connection

    def _find(self, client: "MlflowClient") -> "Run | None":
        """The MLflow run of this run: by the file; by the tag, where a kill came before the file was written."""
        from mlflow.exceptions import MlflowException

        if self.tracker_run_id is not None:
            try:
                return client.get_run(self.tracker_run_id)
            except MlflowException as error:
                if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                    raise
        experiment = client.get_experiment_by_name(self._experiment)
        if experiment is None:
            return None
        found = client.search_runs([experiment.experiment_id], f"tags.`{RUN_TAG}` = '{self._run_id}'", max_results=1)
        if not found:
            return None
        write_whole(self._id_file, found[0].info.run_id)
        return found[0]

    def _create(self, client: "MlflowClient") -> "Run":
        from mlflow.exceptions import MlflowException

        try:
            root = ARTIFACT_ROOT if self._uri is None else None
            experiment_id = client.create_experiment(self._experiment, artifact_location=root)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
            experiment_id = client.get_experiment_by_name(self._experiment).experiment_id
        run = client.create_run(experiment_id, run_name=self._run_id, tags={**self._tags, RUN_TAG: self._run_id})
        write_whole(self._id_file, run.info.run_id)
        return run

    def _complete_params(self, client: "MlflowClient", run: "Run") -> None:
        """Log the params that the run lacks. They are immutable: what a resume changed keeps its first value."""
        from mlflow.entities import Param

        missing = [Param(key, value) for key, value in self._params.items() if key not in run.data.params]
        for start in range(0, len(missing), MAX_PARAMS_PER_BATCH):
            client.log_batch(run.info.run_id, params=missing[start : start + MAX_PARAMS_PER_BATCH])

    def _send_rows(self, client: "MlflowClient", mlflow_run_id: str) -> None:
        from mlflow.entities import Metric

        newest = dict(self._last_steps)
        metrics = []
        for milliseconds, row in self._rows:
            for key, value in row.items():
                is_metric = isinstance(value, int | float) and key not in ("step", "seconds")
                if is_metric and row["step"] > newest.get(key, -1):
                    metrics.append(Metric(key, float(value), milliseconds, row["step"]))
                    newest[key] = row["step"]
        for start in range(0, len(metrics), MAX_METRICS_PER_BATCH):
            client.log_batch(mlflow_run_id, metrics=metrics[start : start + MAX_METRICS_PER_BATCH])
        self._last_steps = newest
        self._rows.clear()

    def _send_file(self, client: "MlflowClient", run: "Run", path: Path) -> None:
        """Through MLflow; into the database's artifacts directly, which MLflow would only do through a server."""
        uri: str = run.info.artifact_uri
        if self._uri is not None or not uri.startswith(ARTIFACT_ROOT):
            client.log_artifact(run.info.run_id, path)
            return
        target = artifacts_directory(self._outputs) / uri.removeprefix(ARTIFACT_ROOT) / path.name
        target.parent.mkdir(parents=True, exist_ok=True)
        aside = target.with_name(f"{target.name}.writing")
        copyfile(path, aside)
        fsync(aside)
        aside.rename(target)


def flat(params: dict[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested settings as MLflow's params: {"trainer": {"lr": 0.1}} -> {"trainer.lr": "0.1"}.

    Values that are no strings are written as JSON; what is longer than MLflow takes ends in `...`.
    """
    found: dict[str, str] = {}
    for key, value in params.items():
        if isinstance(value, dict):
            found |= flat(value, f"{prefix}{key}.")
        else:
            text = value if isinstance(value, str) else json.dumps(value)
            cut = text if len(text) <= MAX_PARAM_CHARACTERS else text[: MAX_PARAM_CHARACTERS - 3] + "..."
            found[prefix + key] = cut
    return found


def _milliseconds(time_utc: str) -> int:
    return round(datetime.fromisoformat(time_utc).timestamp() * 1000)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
