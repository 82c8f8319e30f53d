"""outputs may be copied elsewhere and the original deleted: nothing in it is an absolute path."""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import contextmanager
from pathlib import Path
from urllib.error import URLError

import pytest

from llmtrain.config.tracking import MLflowTracking
from llmtrain.registry.registry import Registry
from llmtrain.telemetry.curves import plot_curves
from llmtrain.telemetry.database import artifacts_directory, database_path
from llmtrain.telemetry.metrics import METRICS_FILE, MetricsFile
from llmtrain.telemetry.tracking import Tracker, open_tracker


def track(outputs: Path, run_id: str) -> Tracker:
    """A run with one row and its curves."""
    directory = outputs / "demo" / run_id
    directory.mkdir(parents=True, exist_ok=True)
    row = {"step": 1, "tokens": 10, "time_utc": "2026-01-02T03:04:05+00:00", "seconds": 0.5, "train/loss": 2.5}
    metrics = MetricsFile(directory / METRICS_FILE)
    metrics.append(row)
    plot_curves(directory / METRICS_FILE, directory / "curves.png", {})
    tracker = open_tracker(
        MLflowTracking(kind="mlflow", uri=None),
        outputs=outputs,
        experiment="demo",
        run_id=run_id,
        run_directory=directory,
        params={"lr": 0.1},
        tags={},
    )
    tracker.log_file(directory / "curves.png")
    tracker.finish("FINISHED")
    return tracker


@pytest.fixture
def moved(outputs, trained, tmp_path):
    """outputs with a tracked run and a version, copied elsewhere; (directory, the version, the MLflow run's id)."""
    tracker = track(outputs, "run1")
    version = Registry(outputs).register("demo", trained(outputs=outputs), tracker_run_id=tracker.tracker_run_id)
    elsewhere = tmp_path / "elsewhere" / "copy"
    shutil.copytree(outputs, elsewhere)
    mlflow_run_id = tracker.tracker_run_id
    shutil.rmtree(outputs)
    for path in elsewhere.rglob("*"):
        assert path.is_dir() or os.fsencode(outputs) not in path.read_bytes(), path
    return elsewhere, version, mlflow_run_id


def test_a_copy_lists_verifies_registers_and_tracks(moved, trained, outputs):
    elsewhere, version, mlflow_run_id = moved
    registry = Registry(elsewhere)
    assert registry.versions() == [version]
    assert registry.get("demo@1.0.0") == version
    assert registry.latest("shape", "tokenizer") == version
    registry.verify(version)
    assert track(elsewhere, "run1").tracker_run_id == mlflow_run_id  # the run goes on
    another = track(elsewhere, "run2")
    assert (artifacts_directory(elsewhere) / another.tracker_run_id / "artifacts" / "curves.png").exists()
    second = registry.register("demo", trained("run2", elsewhere), tracker_run_id=another.tracker_run_id)
    assert second.label == "demo@1.0.1"
    registry.verify(second)
    assert registry.journal.verify() == 2
    assert not outputs.exists()


@contextmanager
def mlflow_server(outputs: Path):
    """The address of a real server on `outputs`, started as the documentation says; ended as a group of its own."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [
        sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1",
        "--backend-store-uri", f"sqlite:///{database_path(outputs)}",
        "--artifacts-destination", str(artifacts_directory(outputs)),
    ]  # fmt: skip
    environment = os.environ | {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    log = outputs.parent / "server.log"
    with log.open("wb") as stream:
        server = subprocess.Popen(command, env=environment, stdout=stream, stderr=stream, start_new_session=True)
    try:
        address = f"http://127.0.0.1:{port}"
        for _ in range(600):
            assert server.poll() is None, log.read_text()
            try:
                urllib.request.urlopen(f"{address}/health", timeout=5).close()
                break
            except (URLError, ConnectionError, TimeoutError):
                time.sleep(0.2)
        yield address
    finally:
        server.terminate()
        server.wait(timeout=60)


def test_mlflows_server_shows_the_copys_run_metrics_artifact_and_version(moved):
    elsewhere, _, mlflow_run_id = moved

    with mlflow_server(elsewhere) as address:

        def get(path: str) -> bytes:
            with urllib.request.urlopen(address + path, timeout=30) as response:
                return response.read()

        api = "/api/2.0/mlflow"
        run = json.loads(get(f"{api}/runs/get?run_id={mlflow_run_id}"))["run"]
        history = json.loads(get(f"{api}/metrics/get-history?run_id={mlflow_run_id}&metric_key=train/loss"))["metrics"]
        files = json.loads(get(f"{api}/artifacts/list?run_id={mlflow_run_id}"))["files"]
        picture = get(f"/get-artifact?run_uuid={mlflow_run_id}&path=curves.png")
        proxied = get(f"/api/2.0/mlflow-artifacts/artifacts/{mlflow_run_id}/artifacts/curves.png")
        stored = json.loads(get(f"{api}/model-versions/get?name=demo&version=1"))["model_version"]
    assert (run["info"]["run_name"], run["info"]["status"]) == ("run1", "FINISHED")
    assert [(metric["step"], metric["value"]) for metric in history] == [(1, 2.5)]
    assert [file["path"] for file in files] == ["curves.png"]
    assert picture == proxied == (elsewhere / "demo" / "run1" / "curves.png").read_bytes()
    assert stored["run_id"] == mlflow_run_id
