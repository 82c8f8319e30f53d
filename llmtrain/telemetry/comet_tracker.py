"""A run in Comet: one experiment for ever, whose key lies in the run's directory.

On-line where the environment has an API key. Elsewhere each session of training leaves an archive in `comet/` of the
run's directory with what the earlier archives lack; `comet upload` sends them, in any order. A session that is killed
leaves no archive, and the next one sends its rows again, from metrics.jsonl.

Comet hears what `Tracker` is told: no code, git state, host, command line, output or usage report. It adds the metric
`process duration` and the param `curr_step`. What is sent again carries the time of sending; Comet's interface takes no
other. A run that goes on without a key after it was on-line has all its rows in the archives: not to be uploaded too.
"""

import json
import logging
import os
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4
from zipfile import BadZipFile, ZipFile

from llmtrain.config.tracking import CometTracking
from llmtrain.errors import UserError
from llmtrain.files import write_whole
from llmtrain.telemetry.outbox import Point, Status, TrackedRun, flat

if TYPE_CHECKING:
    from comet_ml import CometExperiment

KEY_FILE = "comet_experiment_key"
"""File in the run's directory with the experiment's key."""
ARCHIVES = "comet"
"""Directory, in the run's, of what `comet upload` sends."""
MAX_PARAM_CHARACTERS = 1000
FLUSH_SECONDS = 60


def check_installed(kind: str) -> None:
    """Raises UserError where Comet's package is missing."""
    if find_spec("comet_ml") is None:
        raise UserError(
            f"tracking={kind} needs the package comet-ml: pip install 'llmtrain[comet]', or choose tracking=mlflow"
        )


class CometService:
    """See `Service`."""

    name = "Comet"

    def __init__(self, tracking: CometTracking, run: TrackedRun) -> None:
        self._project, self._workspace = tracking.project, tracking.workspace
        self._api_key = os.environ.get(tracking.api_key_env)
        self._run = run
        self._key_file = run.directory / KEY_FILE
        self._archives = run.directory.absolute() / ARCHIVES
        self._experiment: CometExperiment | None = None
        self._sent: dict[str, int] = {}
        if self._api_key:
            self.place = f"on-line, with the key in {tracking.api_key_env}"
            self.remedy = f"Correct {tracking.api_key_env}, unset it to write archives, or choose tracking=mlflow"
        else:
            self.place = f"archives in {run.directory / ARCHIVES}"
            self.remedy = "Make room there, or choose tracking=mlflow"

    @property
    def knows_run(self) -> bool:
        return self._key_file.exists()

    @property
    def mlflow_run_id(self) -> None:
        return None

    def failures(self) -> tuple[type[Exception], ...]:
        _quieten()
        from comet_ml.exceptions import CometException

        return CometException, OSError, ValueError

    def open(self) -> dict[str, int]:
        resumed = self.knows_run
        key = self._key_file.read_text() if resumed else uuid4().hex
        last_steps, params = self._archived_state()
        experiment = self._experiment = self._start(key)
        write_whole(self._key_file, key)
        if self._api_key:
            last_steps, params = self._online_state(key) if resumed else ({}, set())
        if not params:
            experiment.set_name(f"{self._run.experiment} {self._run.run_id}")
            experiment.log_others(self._run.tags)
        mine = flat(self._run.params, MAX_PARAM_CHARACTERS)
        experiment.log_parameters({name: value for name, value in mine.items() if name not in params})
        return last_steps

    def send(self, points: list[Point]) -> None:
        experiment = self._opened()
        for point in points:
            experiment.log_metric(point.key, point.value, step=point.step)
            self._sent[point.key] = point.step

    def set_status(self, status: Status) -> None:
        self._opened().log_other("status", status)

    def send_file(self, path: Path) -> None:
        if path.suffix == ".png":
            self._opened().log_image(str(path), name=path.name, overwrite=True)
        else:
            self._opened().log_asset(str(path), file_name=path.name, overwrite=True)

    def close(self) -> None:
        """Wait until all is sent or in the archive. Raises OSError where it is not."""
        if self._experiment is None:
            return
        if self._api_key:
            self._experiment.flush(timeout=FLUSH_SECONDS)  # so that a connection lost just now is noticed
        self._experiment.end()
        self._experiment = None
        if not self._api_key:
            archived, _ = self._archived_state()
            if lacking := [name for name, step in self._sent.items() if archived.get(name) != step]:
                raise OSError(f"{self._archives} lacks the last of {', '.join(lacking)}; metrics.jsonl has them")
        elif left := sorted(self._archives.glob("*.zip")):
            raise OSError(f"the connection was lost; comet upload {left[-1]} sends it")

    def _opened(self) -> "CometExperiment":
        assert self._experiment is not None, "opened first"
        return self._experiment

    def _start(self, key: str) -> "CometExperiment":
        _quieten()
        import comet_ml

        logging.getLogger("comet_ml").setLevel(logging.CRITICAL)  # what matters of it is raised
        self._archives.mkdir(exist_ok=True)
        nothing_by_itself: dict[str, Any] = dict.fromkeys(
            (
                "log_code", "log_graph", "parse_args", "log_git_metadata", "log_git_patch", "log_env_details",
                "log_env_gpu", "log_env_host", "log_env_cpu", "log_env_network", "log_env_disk", "auto_output_logging",
                "auto_param_logging", "auto_metric_logging", "auto_log_co2", "disabled",
            ),
            False,
        )  # fmt: skip
        settings = comet_ml.ExperimentConfig(
            **nothing_by_itself, display_summary_level=0, offline_directory=str(self._archives)
        )
        try:
            experiment = comet_ml.start(
                api_key=self._api_key,
                workspace=self._workspace,
                project_name=self._project,
                experiment_key=key,
                mode="get_or_create",
                online=bool(self._api_key),
                experiment_config=settings,
            )
        except comet_ml.exceptions.CometException as error:
            words = getattr(error, "log_message", None)  # its exceptions keep words and values apart
            reason = (words % error.args if error.args else words) if words else str(error)
            raise OSError(reason.replace(self._api_key or key, "***")) from None  # the key is a secret
        if not experiment.alive:
            raise OSError("Comet opened no experiment")
        experiment.send_notification = _no_mail  # it would be sent in the name of the machine's user
        return experiment

    def _online_state(self, key: str) -> tuple[dict[str, int], set[str]]:
        """The last step of each metric that Comet's server has, and the names of the params.

        Archives are removed: the server is sent all that it lacks, so that they hold nothing more.
        """
        import comet_ml

        experiment = comet_ml.APIExperiment(api_key=self._api_key, previous_experiment=key, cache=False)
        metrics, params = experiment.get_metrics_summary(), experiment.get_parameters_summary()
        for archive in self._archives.glob("*.zip"):
            archive.unlink()
        last_steps = {one["name"]: one["stepCurrent"] for one in metrics if one["stepCurrent"] is not None}
        return last_steps, {one["name"] for one in params}

    def _archived_state(self) -> tuple[dict[str, int], set[str]]:
        """The last step of each metric that the archives have, and the names of the params."""
        last_steps: dict[str, int] = {}
        params = set()
        for kind, payload in self._archived():
            match kind:
                case "metric_msg" if payload["metric"]["step"] is not None:
                    metric = payload["metric"]
                    last_steps[metric["metricName"]] = max(metric["step"], last_steps.get(metric["metricName"], -1))
                case "parameter_msg":
                    params.add(payload["param"]["paramName"])
        return last_steps, params

    def _archived(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Kind and content of each message in the archives. One that is not whole is removed: its writer was killed."""
        for path in sorted(self._archives.glob("*.zip")):
            try:
                with ZipFile(path) as archive:
                    lines = archive.read("messages.json").splitlines()
            except (BadZipFile, KeyError):
                path.unlink()
                continue
            for line in lines:
                message = json.loads(line)
                yield message["type"], message["payload"]


def _no_mail(*_: Any, **__: Any) -> None:
    """In the place of the summary that Comet mails at the end of an experiment."""


def _quieten() -> None:
    """No patched libraries, no reports to Comet's makers, no chatter, no hours of waiting.

    Comet reads these when it is imported, so this comes first.
    """
    os.environ["COMET_DISABLE_AUTO_LOGGING"] = "1"
    os.environ["COMET_ERROR_TRACKING_ENABLE"] = "false"
    os.environ["COMET_INTERNAL_REPORTING"] = "false"
    os.environ.setdefault("COMET_TIMEOUT_HTTP", "20")  # seconds
    os.environ.setdefault("COMET_TIMEOUT_CLEANING", "60")  # seconds, at the end of a run; so the next
    os.environ.setdefault("COMET_TIMEOUT_UPLOAD", "60")
    os.environ.setdefault("COMET_GET_OR_ADD_EXPERIMENT_RETRY_TOTAL", "1")
    os.environ.setdefault("COMET_HTTP_SESSION_RETRY_TOTAL", "1")
