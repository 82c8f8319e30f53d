"""A run in MLflow: one for ever, found by its id in the run's directory, or by its tag."""

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from shutil import copyfile
from typing import TYPE_CHECKING

from llmtrain.config.tracking import MLflowTracking
from llmtrain.files import fsync, write_whole
from llmtrain.telemetry import database
from llmtrain.telemetry.database import ARTIFACT_ROOT, artifacts_directory, open_client, open_database
from llmtrain.telemetry.outbox import Point, Status, TrackedRun, flat

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

RUN_TAG = "llmtrain.run_id"
"""Tag of the MLflow run with our run id."""
ID_FILE = "mlflow_run_id"
"""File in the run's directory with the MLflow run's id."""
MAX_PARAM_CHARACTERS = 6000
MAX_PARAMS_PER_BATCH = 100
MAX_METRICS_PER_BATCH = 1000


class MLflowService:
    """See `Service`. MLflow ignores points that come twice."""

    name = "MLflow"
    remedy = "Start the server, correct the tracking uri, or choose tracking=none"

    def __init__(self, tracking: MLflowTracking, outputs: Path, run: TrackedRun) -> None:
        self._uri, self._outputs, self._run = tracking.uri, outputs, run
        self._id_file = run.directory / ID_FILE
        self._connection: tuple[MlflowClient, Run] | None = None
        self.place = f"uri: {self._uri or outputs / 'mlflow'}"

    @property
    def knows_run(self) -> bool:
        return self._id_file.exists()

    @property
    def mlflow_run_id(self) -> str | None:
        return self._id_file.read_text() if self._id_file.exists() else None

    def failures(self) -> tuple[type[Exception], ...]:
        return database.failures()

    def open(self) -> dict[str, int]:
        with self._in_words():
            client = open_database(self._outputs) if self._uri is None else open_client(self._uri)
            run = self._find(client) or self._create(client)
            if run.info.status != "RUNNING":
                client.update_run(run.info.run_id, status="RUNNING")
            self._complete_params(client, run)
            self._connection = client, run
            return {
                key: max(metric.step for metric in client.get_metric_history(run.info.run_id, key))
                for key in run.data.metrics
            }

    def send(self, points: list[Point]) -> None:
        from mlflow.entities import Metric

        client, run = self._connected()
        metrics = [Metric(point.key, point.value, point.milliseconds, point.step) for point in points]
        with self._in_words():
            for start in range(0, len(metrics), MAX_METRICS_PER_BATCH):
                client.log_batch(run.info.run_id, metrics=metrics[start : start + MAX_METRICS_PER_BATCH])

    def set_status(self, status: Status) -> None:
        client, run = self._connected()
        with self._in_words():
            client.set_terminated(run.info.run_id, status)

    def send_file(self, path: Path) -> None:
        """Through MLflow; into the database's artifacts directly, which MLflow would only do through a server."""
        client, run = self._connected()
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

    def close(self) -> None:
        """Nothing goes on in the background."""

    def _in_words(self) -> AbstractContextManager[None]:
        return database.in_words(self._outputs) if self._uri is None else nullcontext()

    def _connected(self) -> "tuple[MlflowClient, Run]":
        assert self._connection is not None, "opened first"
        return self._connection

    def _find(self, client: "MlflowClient") -> "Run | None":
        """The MLflow run of this run: by the file; by the tag, where a kill came before the file was written."""
        from mlflow.exceptions import MlflowException

        if self.mlflow_run_id is not None:
            try:
                return client.get_run(self.mlflow_run_id)
            except MlflowException as error:
                if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                    raise
        experiment = client.get_experiment_by_name(self._run.experiment)
        if experiment is None:
            return None
        tagged = f"tags.`{RUN_TAG}` = '{self._run.run_id}'"
        found = client.search_runs([experiment.experiment_id], tagged, max_results=1)
        if not found:
            return None
        write_whole(self._id_file, found[0].info.run_id)
        return found[0]

    def _create(self, client: "MlflowClient") -> "Run":
        from mlflow.exceptions import MlflowException

        experiment, run_id = self._run.experiment, self._run.run_id
        try:
            root = ARTIFACT_ROOT if self._uri is None else None
            experiment_id = client.create_experiment(experiment, artifact_location=root)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
            experiment_id = client.get_experiment_by_name(experiment).experiment_id
        run = client.create_run(experiment_id, run_name=run_id, tags={**self._run.tags, RUN_TAG: run_id})
        write_whole(self._id_file, run.info.run_id)
        return run

    def _complete_params(self, client: "MlflowClient", run: "Run") -> None:
        """Log the params that the run lacks. They are immutable: what a resume changed keeps its first value."""
        from mlflow.entities import Param

        params = flat(self._run.params, MAX_PARAM_CHARACTERS)
        missing = [Param(key, value) for key, value in params.items() if key not in run.data.params]
        for start in range(0, len(missing), MAX_PARAMS_PER_BATCH):
            client.log_batch(run.info.run_id, params=missing[start : start + MAX_PARAMS_PER_BATCH])
