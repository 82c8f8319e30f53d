"""One MLflow run per training run, each metric once per step, whatever is killed, repeated or away."""

import math
import os
import shutil
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest
from mlflow import MlflowClient
from tracked_runs import exit_code, row, start

from llmtrain.config.tracking import MLflowTracking
from llmtrain.errors import UserError
from llmtrain.telemetry import database, mlflow_tracker, outbox
from llmtrain.telemetry.database import artifacts_directory, database_path, open_database
from llmtrain.telemetry.metrics import METRICS_FILE, MetricsFile
from llmtrain.telemetry.tracking import Tracker


def history(outputs: Path, tracker: Tracker, key: str) -> list[tuple[int, float]]:
    """(step, value) as MLflow has them."""
    found = open_database(outputs).get_metric_history(tracker.tracker_run_id, key)
    return sorted((metric.step, metric.value) for metric in found)


def runs(outputs: Path) -> list:
    client = open_database(outputs)
    return client.search_runs([experiment.experiment_id for experiment in client.search_experiments()])


def test_a_run_has_its_metrics_params_tags_and_status(outputs):
    tracker = start(outputs, trainer={"lr": 3e-4, "betas": [0.9, 0.95]}, name="demo", long="x" * 7000, none=None)
    tracker.log(1, {"train/loss": 2.5, "tokens": 10})
    tracker.log(2, {"train/loss": 2.25, "tokens": 20})
    tracker.finish("FINISHED")
    (run,) = runs(outputs)
    assert run.info.run_id == tracker.tracker_run_id
    assert (run.info.run_name, run.info.status) == ("run1", "FINISHED")
    assert run.data.params == {
        "trainer.lr": "0.0003",
        "trainer.betas": "[0.9, 0.95]",
        "name": "demo",
        "long": "x" * 5997 + "...",
        "none": "null",
    }
    assert run.data.tags["llmtrain.run_id"] == "run1"
    assert run.data.tags["purpose"] == "test"
    assert history(outputs, tracker, "train/loss") == [(1, 2.5), (2, 2.25)]
    assert history(outputs, tracker, "tokens") == [(1, 10.0), (2, 20.0)]


def test_more_params_than_mlflow_takes_at_once_all_arrive(outputs):
    start(outputs, many={f"p{number}": number for number in range(250)})
    assert len(runs(outputs)[0].data.params) == 250


def test_a_resumed_run_skips_steps_that_the_tracker_has(outputs):
    first = start(outputs, micro_batch=8)
    for step in (1, 2, 3):
        first.log(step, {"train/loss": float(step)})
    first.log(3, {"validation/loss": 33.0})
    first.finish("KILLED")
    mlflow_run_id = first.tracker_run_id
    second = start(outputs, micro_batch=16)  # params are immutable: the first value stays
    assert runs(outputs)[0].info.status == "RUNNING"
    for step in (2, 3, 4):
        second.log(step, {"train/loss": step + 0.5, "validation/loss": 10.0 * step})
    assert second.tracker_run_id == mlflow_run_id
    assert history(outputs, second, "train/loss") == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 4.5)]
    assert history(outputs, second, "validation/loss") == [(3, 33.0), (4, 40.0)]
    assert runs(outputs)[0].data.params == {"micro_batch": "8"}


def test_rows_of_the_file_that_the_tracker_lacks_are_sent_on_open(outputs):
    first = start(outputs)
    first.log(1, {"train/loss": 1.0})
    metrics = MetricsFile(outputs / "demo" / "run1" / METRICS_FILE)
    for step in (1, 2, 3):
        metrics.append(row(step, float(step)))
    second = start(outputs)
    assert history(outputs, second, "train/loss") == [(1, 1.0), (2, 2.0), (3, 3.0)]
    sent = open_database(outputs).get_metric_history(second.tracker_run_id, "train/loss")
    assert max(sent, key=lambda metric: metric.step).timestamp == 1767323045000  # 2026-01-02T03:04:05Z
    assert "seconds" not in runs(outputs)[0].data.metrics


def test_non_finite_values_are_kept_as_mlflow_keeps_them(outputs):
    tracker = start(outputs)
    tracker.log(1, {"train/loss": math.nan, "train/grad_norm": math.inf})
    tracker.log(2, {"train/loss": 1.0, "train/grad_norm": -math.inf})
    (_, nan), one = history(outputs, tracker, "train/loss")
    assert math.isnan(nan)
    assert one == (2, 1.0)
    assert history(outputs, tracker, "train/grad_norm") == [(1, sys.float_info.max), (2, -sys.float_info.max)]


def test_files_lie_where_the_server_looks_for_them(outputs, tmp_path):
    tracker = start(outputs)
    (tmp_path / "curves.png").write_bytes(b"old")
    tracker.log_file(tmp_path / "curves.png")
    (tmp_path / "curves.png").write_bytes(b"new")
    tracker.log_file(tmp_path / "curves.png")
    place = artifacts_directory(outputs) / tracker.tracker_run_id / "artifacts"
    assert [path.name for path in place.iterdir()] == ["curves.png"]
    assert (place / "curves.png").read_bytes() == b"new"
    assert runs(outputs)[0].info.artifact_uri == f"mlflow-artifacts:/{tracker.tracker_run_id}/artifacts"


def test_a_kill_between_creating_the_run_and_writing_its_file_makes_no_second_run(outputs):
    def start_and_die() -> None:
        mlflow_tracker.write_whole = lambda path, text: os._exit(9)
        start(outputs)

    assert exit_code(start_and_die) == 9
    assert not (outputs / "demo" / "run1" / mlflow_tracker.ID_FILE).exists()
    (orphan,) = runs(outputs)
    assert start(outputs).tracker_run_id == orphan.info.run_id
    assert len(runs(outputs)) == 1


def test_a_run_whose_experiment_was_renamed_is_found_by_its_file(outputs):
    mlflow_run_id = start(outputs).tracker_run_id
    client = open_database(outputs)
    client.rename_experiment(client.get_experiment_by_name("demo").experiment_id, "renamed")
    assert start(outputs).tracker_run_id == mlflow_run_id
    assert len(runs(outputs)) == 1


@pytest.mark.campaign  # MLflow waits 20 s for a lock
def test_a_locked_database_delays_rows_and_stops_nothing(outputs, caplog):
    tracker = start(outputs)
    tracker.log(1, {"train/loss": 1.0})
    blocker = sqlite3.connect(database_path(outputs))
    blocker.execute("BEGIN EXCLUSIVE")
    tracker.log(2, {"train/loss": 2.0})
    blocker.rollback()
    blocker.close()
    assert [record.levelname for record in caplog.records if record.name == outbox.__name__] == ["WARNING"]
    tracker.log(3, {"train/loss": 3.0})  # too early for an attempt
    assert history(outputs, tracker, "train/loss") == [(1, 1.0)]
    tracker.finish("FINISHED")
    assert history(outputs, tracker, "train/loss") == [(1, 1.0), (2, 2.0), (3, 3.0)]
    assert runs(outputs)[0].info.status == "FINISHED"


def test_a_damaged_database_warns_once_and_rows_arrive_when_it_is_restored(outputs, monkeypatch, caplog):
    monkeypatch.setattr(outbox, "WAITING_SHARE", math.inf)  # each row is an attempt
    tracker = start(outputs)
    tracker.log(1, {"train/loss": 1.0})
    whole = database_path(outputs).read_bytes()
    database_path(outputs).write_bytes(b"not a database" * 1000)
    for step in (2, 3, 4):
        tracker.log(step, {"train/loss": float(step)})
    warnings = [record for record in caplog.records if record.name == outbox.__name__]
    assert len(warnings) == 1
    database_path(outputs).write_bytes(whole)
    tracker.finish("FAILED")
    assert history(outputs, tracker, "train/loss") == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 4.0)]


def test_a_batch_whose_reply_was_lost_is_not_sent_twice(outputs, monkeypatch):
    def log_and_lose_the_reply(*arguments, **named) -> None:
        log_batch(*arguments, **named)
        monkeypatch.setattr(MlflowClient, "log_batch", log_batch)
        raise ConnectionError

    tracker = start(outputs)
    log_batch = MlflowClient.log_batch
    monkeypatch.setattr(MlflowClient, "log_batch", log_and_lose_the_reply)
    tracker.log(1, {"train/loss": 1.0})
    tracker.finish("FINISHED")
    assert history(outputs, tracker, "train/loss") == [(1, 1.0)]


def test_a_resumed_run_with_a_damaged_database_goes_on(outputs, caplog):
    mlflow_run_id = start(outputs).tracker_run_id
    shutil.copytree(outputs, outputs.with_name("copy"))  # MLflow has no open connection to the copy
    database_path(outputs.with_name("copy")).write_bytes(b"not a database" * 1000)
    tracker = start(outputs.with_name("copy"))
    tracker.log(1, {"train/loss": 1.0})
    tracker.finish("FINISHED")
    assert tracker.tracker_run_id == mlflow_run_id
    assert "not a database" in caplog.text


def test_attempts_on_a_failing_tracker_take_a_tenth_of_the_time(outputs):
    tracker = start(outputs)
    tracker._service._uri = "http://127.0.0.1:9"  # nothing listens on the discard port
    tracker._last_steps = None  # not open
    started = time.monotonic()
    tracker.log(1, {"train/loss": 1.0})
    took = time.monotonic() - started
    assert tracker._retry_at - time.monotonic() == pytest.approx(10 * took, rel=0.2)


def test_a_new_run_whose_server_is_away_says_so_before_training(outputs, monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(UserError, match=r"http://127\.0\.0\.1:9.*\n.*tracking=none"):
        start(outputs, config=MLflowTracking(kind="mlflow", uri="http://127.0.0.1:9"))


def test_a_resumed_run_whose_server_is_away_goes_on(outputs, monkeypatch, caplog):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    first = start(outputs)
    second = start(outputs, config=MLflowTracking(kind="mlflow", uri="http://127.0.0.1:9"))
    second.log(1, {"train/loss": 1.0})
    second.finish("FINISHED")
    assert second.tracker_run_id == first.tracker_run_id
    assert len([record for record in caplog.records if record.name == outbox.__name__]) == 1


QUIET = """
import os, socket, sys
from pathlib import Path
socket.getaddrinfo = socket.socket.connect = lambda *_, **__: os._exit(7)  # in whichever thread
from llmtrain.config.tracking import MLflowTracking
from llmtrain.telemetry.tracking import open_tracker
outputs = Path(sys.argv[1])
tracker = open_tracker(MLflowTracking(kind="mlflow", uri=None), outputs=outputs, experiment="demo", run_id="run1",
                       run_directory=outputs, params={}, tags={})
tracker.log(1, {"train/loss": 1.0})
tracker.finish("FINISHED")
"""


def test_first_use_says_one_line_calls_no_network_and_leaves_nothing_elsewhere(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("MLFLOW", "PYTEST", "CI"))}
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    done = subprocess.run(
        [sys.executable, "-c", QUIET, str(tmp_path / "outputs")],
        cwd=tmp_path / "elsewhere", env=environment, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1
    assert "first use" in done.stderr
    assert list((tmp_path / "elsewhere").iterdir()) == []


def test_a_kill_while_the_database_is_made_leaves_none(tmp_path):
    def create_and_die() -> None:
        database.fsync = lambda path: os._exit(9)
        open_database(tmp_path)

    assert exit_code(create_and_die) == 9
    assert not database_path(tmp_path).exists()
    (database_path(tmp_path).parent / "mlflow.db.writing").write_bytes(b"half")
    assert open_database(tmp_path).search_experiments()[0].artifact_location == "mlflow-artifacts:/0"


def test_odd_directory_names_work(migrated, tmp_path):
    outputs = tmp_path / "100% of a?b #c"
    outputs.mkdir()
    database_path(outputs).parent.mkdir()
    database_path(outputs).write_bytes(database_path(migrated).read_bytes())
    tracker = start(outputs)
    tracker.log(1, {"train/loss": 1.0})
    with sqlite3.connect(database_path(outputs)) as connection:
        assert connection.execute("SELECT step, value FROM metrics").fetchall() == [(1, 1.0)]
    connection.close()


def test_a_file_that_is_no_database_is_named_with_the_way_out(tmp_path):
    database_path(tmp_path).parent.mkdir()
    database_path(tmp_path).write_bytes(b"not a database" * 1000)
    with pytest.raises(UserError, match=r"mlflow\.db cannot be opened: .*not a database"):
        open_database(tmp_path)
    assert database_path(tmp_path).read_bytes() == b"not a database" * 1000  # nothing that existed is lost
