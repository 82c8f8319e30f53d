"""No tracker, and two at once."""

import json
import sqlite3
from pathlib import Path
from zipfile import ZipFile

from tracked_runs import BOTH, start

from llmtrain.config.tracking import NoTracking
from llmtrain.telemetry import outbox
from llmtrain.telemetry.database import database_path
from llmtrain.telemetry.tracking import Tracker


def in_mlflow(outputs: Path) -> list[tuple[str, int, float]]:
    with sqlite3.connect(database_path(outputs)) as connection:
        found = connection.execute("SELECT key, step, value FROM metrics ORDER BY step, key").fetchall()
    connection.close()
    return found


def in_comet(outputs: Path) -> list[tuple[str, int, float]]:
    (archive,) = (outputs / "demo" / "run1" / "comet").glob("*.zip")
    messages = [json.loads(line) for line in ZipFile(archive).read("messages.json").splitlines()]
    found = [message["payload"]["metric"] for message in messages if message["type"] == "metric_msg"]
    return sorted((metric["metricName"], metric["step"], metric["metricValue"]) for metric in found)


def log_three_rows(tracker: Tracker) -> list[tuple[str, int, float]]:
    for step in (1, 2, 3):
        tracker.log(step, {"train/loss": step / 3})
    tracker.finish("FINISHED")
    return [("train/loss", 1, 1 / 3), ("train/loss", 2, 2 / 3), ("train/loss", 3, 1.0)]


def test_no_tracking_accepts_everything_and_has_no_run(tmp_path):
    tracker = start(tmp_path, NoTracking(kind="none"))
    tracker.log(1, {"train/loss": 1.0})
    tracker.log_file(tmp_path / "absent.png")
    tracker.finish("FINISHED")
    assert tracker.tracker_run_id is None
    assert not database_path(tmp_path).exists()


def test_both_get_each_row_and_the_registry_gets_mlflows_run(outputs):
    tracker = start(outputs, BOTH)
    rows = log_three_rows(tracker)
    assert in_mlflow(outputs) == in_comet(outputs) == rows
    assert tracker.tracker_run_id == (outputs / "demo" / "run1" / "mlflow_run_id").read_text()


def test_a_damaged_database_does_not_stop_comet(outputs, caplog):
    tracker = start(outputs, BOTH)
    database_path(outputs).write_bytes(b"not a database" * 1000)
    assert log_three_rows(tracker) == in_comet(outputs)
    warnings = [record.getMessage() for record in caplog.records if record.name == outbox.__name__]
    assert len(warnings) == 1
    assert warnings[0].startswith("MLflow fails")


def test_archives_that_cannot_be_written_do_not_stop_mlflow(outputs, caplog):
    start(outputs, BOTH).finish("KILLED")
    archives = outputs / "demo" / "run1" / "comet"
    archives.rename(archives.with_name("away"))
    archives.write_text("in the way")
    rows = log_three_rows(start(outputs, BOTH))
    assert in_mlflow(outputs) == rows
    warnings = [record.getMessage() for record in caplog.records if record.name == outbox.__name__]
    assert len(warnings) == 1
    assert warnings[0].startswith("Comet fails")
