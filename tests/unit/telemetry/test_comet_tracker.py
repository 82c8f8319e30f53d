"""One Comet experiment per training run, each metric once per step: in archives without a key, on-line with one."""

import getpass
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from zipfile import ZipFile

import pytest
from comet_server import CometServer, comet_server
from tracked_runs import COMET, exit_code, row, start

from llmtrain.errors import UserError
from llmtrain.telemetry import comet_tracker, outbox
from llmtrain.telemetry.metrics import METRICS_FILE, MetricsFile
from llmtrain.telemetry.tracking import check_tracking

API_KEY = "0123456789abcdefghijklmno"


def archives(outputs: Path) -> list[Path]:
    return sorted((outputs / "demo" / "run1" / "comet").iterdir())


def sent(outputs: Path, *kinds: str) -> list[dict]:
    """What the messages of these kinds hold, in all archives of the run, in the order in which they were written."""
    found = []
    for path in sorted(archives(outputs), key=lambda path: path.stat().st_mtime_ns):
        messages = [json.loads(line) for line in ZipFile(path).read("messages.json").splitlines()]
        found += [message["payload"] for message in messages if message["type"] in kinds]
    return found


def metrics(outputs: Path) -> list[tuple[str, int, float]]:
    """(name, step, value) of every metric in the archives."""
    found = [payload["metric"] for payload in sent(outputs, "metric_msg")]
    return [(metric["metricName"], metric["step"], metric["metricValue"]) for metric in found]


def params(outputs: Path) -> dict[str, str]:
    found = [payload["param"] for payload in sent(outputs, "parameter_msg")]
    return {param["paramName"]: param["paramValue"] for param in found if param["source"] == "manual"}


def key(outputs: Path) -> str:
    return (outputs / "demo" / "run1" / comet_tracker.KEY_FILE).read_text()


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == outbox.__name__]


def test_an_archive_has_what_training_told_and_nothing_else(tmp_path):
    tracker = start(tmp_path, COMET, trainer={"lr": 3e-4}, long="x" * 2000)
    tracker.log(1, {"train/loss": 0.1 + 0.2, "tokens": 10})
    tracker.log(2, {"train/loss": float("nan"), "tokens": 20})
    (tmp_path / "curves.png").write_bytes(b"picture")
    (tmp_path / "config.json").write_text("{}")
    tracker.log_file(tmp_path / "curves.png")
    tracker.log_file(tmp_path / "config.json")
    tracker.finish("FINISHED")
    assert tracker.tracker_run_id is None  # no MLflow run
    assert metrics(tmp_path) == [
        ("train/loss", 1, 0.30000000000000004), ("tokens", 1, 10.0), ("train/loss", 2, "NaN"), ("tokens", 2, 20.0),
    ]  # fmt: skip
    assert params(tmp_path) == {"trainer.lr": "0.0003", "long": "x" * 997 + "..."}
    assert {payload["key"]: payload["value"] for payload in sent(tmp_path, "log_other")} == {
        "Name": "demo run1",
        "purpose": "test",
        "status": "FINISHED",
        "offline_experiment": True,
    }
    (archive,) = archives(tmp_path)
    whole = ZipFile(archive)
    files = sent(tmp_path, "file_upload")
    assert [file["additional_params"].get("figName", "config.json") for file in files] == ["curves.png", "config.json"]
    assert [whole.read(file["file_path"]) for file in files] == [b"picture", b"{}"]
    kinds = {json.loads(line)["type"] for line in whole.read("messages.json").splitlines()}
    assert kinds == {"log_other", "metric_msg", "parameter_msg", "file_upload"}
    assert json.loads(whole.read("experiment.json"))["offline_id"] == key(tmp_path)


def test_a_resumed_run_adds_an_archive_with_what_the_first_lacks(tmp_path):
    first = start(tmp_path, COMET, micro_batch=8)
    for step in (1, 2, 3):
        first.log(step, {"train/loss": float(step)})
    first.finish("KILLED")
    experiment = key(tmp_path)
    second = start(tmp_path, COMET, micro_batch=16)  # as in MLflow, the first value stays
    for step in (2, 3, 4):
        second.log(step, {"train/loss": step + 0.5})
    second.finish("FINISHED")
    assert key(tmp_path) == experiment
    assert [json.loads(ZipFile(path).read("experiment.json"))["offline_id"] for path in archives(tmp_path)] == [
        experiment,
        experiment,
    ]
    assert metrics(tmp_path) == [("train/loss", 1, 1.0), ("train/loss", 2, 2.0), ("train/loss", 3, 3.0),
                                 ("train/loss", 4, 4.5)]  # fmt: skip
    assert params(tmp_path) == {"micro_batch": "8"}


def test_what_a_killed_session_did_not_archive_is_sent_again(tmp_path):
    def start_and_die() -> None:
        tracker = start(tmp_path, COMET)
        rows = MetricsFile(tmp_path / "demo" / "run1" / METRICS_FILE)
        for step in (1, 2):
            rows.append(row(step, float(step)))
            tracker.log(step, {"train/loss": float(step), "tokens": 10 * step})
        os._exit(9)

    assert exit_code(start_and_die) == 9
    experiment = key(tmp_path)
    tracker = start(tmp_path, COMET)
    tracker.log(3, {"train/loss": 3.0})
    tracker.finish("FINISHED")
    assert key(tmp_path) == experiment
    assert [point for point in metrics(tmp_path) if point[0] == "train/loss"] == [
        ("train/loss", 1, 1.0), ("train/loss", 2, 2.0), ("train/loss", 3, 3.0),
    ]  # fmt: skip


def test_an_archive_that_was_not_written_to_its_end_is_written_anew(tmp_path):
    first = start(tmp_path, COMET)
    MetricsFile(tmp_path / "demo" / "run1" / METRICS_FILE).append(row(1, 1.0))
    first.log(1, {"train/loss": 1.0, "tokens": 10})
    first.finish("KILLED")
    (archive,) = archives(tmp_path)
    archive.write_bytes(archive.read_bytes()[:-30])
    start(tmp_path, COMET).finish("FINISHED")
    assert archive not in archives(tmp_path)
    assert metrics(tmp_path) == [("tokens", 1, 10.0), ("train/loss", 1, 1.0)]


def test_an_archive_that_lacks_rows_is_said(tmp_path, caplog):
    tracker = start(tmp_path, COMET)
    tracker.log(1, {"train/loss": 1.0})
    messages = Path(tracker._service._experiment.tmpdir) / "messages.json"
    deadline = time.monotonic() + 20
    while not messages.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    messages.unlink()  # as a cleaner of temporary files does
    tracker.finish("FINISHED")
    assert len(warnings(caplog)) == 1
    assert "lacks the last of train/loss" in warnings(caplog)[0]


def test_a_new_run_whose_archives_cannot_be_written_says_so_before_training(tmp_path):
    (tmp_path / "demo" / "run1").mkdir(parents=True)
    (tmp_path / "demo" / "run1" / "comet").write_text("in the way")
    for _ in range(2):  # the second time too: nothing was begun
        with pytest.raises(
            UserError, match=r"Comet does not take this run \(archives in .*comet\).*\n.*tracking=mlflow"
        ):
            start(tmp_path, COMET)


def test_a_missing_package_is_named_with_the_way_to_it(monkeypatch):
    monkeypatch.delitem(sys.modules, "comet_ml", raising=False)
    monkeypatch.setattr(sys, "path", [])
    with pytest.raises(UserError, match=r"tracking=comet needs the package comet-ml: pip install 'llmtrain\[comet\]'"):
        check_tracking(COMET)


QUIET = """
import os, socket, sys
from pathlib import Path
socket.getaddrinfo = socket.socket.connect = lambda *_, **__: os._exit(7)  # in whichever thread
from llmtrain.config.tracking import CometTracking
from llmtrain.telemetry.tracking import open_tracker
assert "comet_ml" not in sys.modules, "imported only when it is chosen"
outputs = Path(sys.argv[1])
tracking = CometTracking(kind="comet", project=None, workspace=None, api_key_env="COMET_KEY_OF_THE_TESTS")
for metrics in ({}, {"train/loss": 1.0}):
    tracker = open_tracker(tracking, outputs=outputs, experiment="demo", run_id="run1", params={}, tags={},
                           run_directory=outputs / "demo" / "run1")
    tracker.log(1, metrics)
    tracker.finish("FINISHED")
assert not any(type(finder).__module__.startswith("comet_ml") for finder in sys.meta_path), "no import is patched"
import sentry_sdk
assert not sentry_sdk.get_client().is_active(), "no reports to Comet's makers"
"""


def test_without_a_key_nothing_is_said_no_network_called_and_nothing_left_elsewhere(tmp_path):
    for name in ("elsewhere", "temporary", "outputs/demo/run1"):
        (tmp_path / name).mkdir(parents=True)
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("COMET", "PYTEST"))}
    environment |= {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path), "TMPDIR": f"{tmp_path}/temporary"}
    done = subprocess.run(
        [sys.executable, "-c", QUIET, str(tmp_path / "outputs")],
        cwd=tmp_path / "elsewhere", env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert list((tmp_path / "elsewhere").iterdir()) == list((tmp_path / "temporary").iterdir()) == []
    assert metrics(tmp_path / "outputs") == [
        ("process duration", None, 0),  # Comet's own
        ("train/loss", 1, 1.0),
        ("process duration", 1, 0),
    ]


@pytest.fixture
def server(monkeypatch) -> CometServer:
    monkeypatch.setenv(COMET.api_key_env, API_KEY)
    with comet_server(API_KEY) as server:
        monkeypatch.setenv("COMET_URL_OVERRIDE", server.address)
        yield server


def test_with_a_key_a_run_goes_to_the_server_and_a_resume_sends_what_it_lacks(server, tmp_path):
    first = start(tmp_path, COMET, trainer={"lr": 3e-4})
    for step in (1, 2):
        first.log(step, {"train/loss": step + 0.5})
    first.finish("KILLED")
    second = start(tmp_path, COMET, trainer={"lr": 1.0})
    for step in (2, 3):
        second.log(step, {"train/loss": float(step)})
    (tmp_path / "curves.png").write_bytes(b"picture")
    second.log_file(tmp_path / "curves.png")
    second.finish("FINISHED")
    assert server.experiments == [key(tmp_path)]
    assert server.metrics == [("train/loss", 1, 1.5), ("train/loss", 2, 2.5), ("train/loss", 3, 3.0)]
    assert server.params["trainer.lr"] == "0.0003"
    assert (server.others["purpose"], server.others["status"]) == ("test", "FINISHED")
    assert server.files == ["curves.png"]
    assert archives(tmp_path) == []
    for private in (getpass.getuser(), socket.gethostname(), os.getcwd(), sys.executable):
        assert f'"{private}'.encode() not in server.everything


def test_archives_of_a_run_that_goes_on_line_are_sent_as_rows(server, tmp_path, monkeypatch):
    monkeypatch.delenv(COMET.api_key_env)
    first = start(tmp_path, COMET)
    MetricsFile(tmp_path / "demo" / "run1" / METRICS_FILE).append(row(1, 1.0))
    first.log(1, {"train/loss": 1.0, "tokens": 10})
    first.finish("KILLED")
    monkeypatch.setenv(COMET.api_key_env, API_KEY)
    start(tmp_path, COMET).finish("FINISHED")
    assert server.experiments == [key(tmp_path)]
    assert server.metrics == [("tokens", 1, 10.0), ("train/loss", 1, 1.0)]
    assert server.others["Name"] == "demo run1"
    assert archives(tmp_path) == []


def test_a_key_that_comet_does_not_know_is_said_before_training(server, tmp_path, monkeypatch):
    monkeypatch.setenv(COMET.api_key_env, "another" + API_KEY)
    for _ in range(2):
        with pytest.raises(UserError, match=r"key in COMET_KEY_OF_THE_TESTS\): .*API key.*\nCorrect COMET") as found:
            start(tmp_path, COMET)
        assert API_KEY not in str(found.value)


def test_a_resumed_run_whose_server_is_away_goes_on(server, tmp_path, monkeypatch, caplog):
    start(tmp_path, COMET).finish("KILLED")
    monkeypatch.setenv("COMET_URL_OVERRIDE", "http://127.0.0.1:9/clientlib/")
    tracker = start(tmp_path, COMET)
    tracker.log(1, {"train/loss": 1.0})
    monkeypatch.setenv("COMET_URL_OVERRIDE", server.address)
    tracker.finish("FINISHED")
    assert len(warnings(caplog)) == 1
    assert server.metrics == [("train/loss", 1, 1.0)]


def test_what_a_lost_connection_kept_back_lies_in_an_archive_that_is_named(server, tmp_path, caplog):
    tracker = start(tmp_path, COMET)
    tracker.log(1, {"train/loss": 1.0})
    while not server.metrics:
        time.sleep(0.01)
    server.shutdown()
    server.server_close()
    tracker.log(2, {"train/loss": 2.0})
    tracker.finish("FINISHED")
    (archive,) = archives(tmp_path)
    assert warnings(caplog) == [
        f"Comet did not take everything: the connection was lost; comet upload {archive} sends it"
    ]
    assert ("train/loss", 2, 2.0) in metrics(tmp_path)
