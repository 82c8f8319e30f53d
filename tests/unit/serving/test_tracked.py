"""Counters of an endpoint reach metrics.jsonl and a real MLflow database."""

from pathlib import Path

from llmtrain.artifacts import ServedModel
from llmtrain.config.tracking import MLflowTracking
from llmtrain.serving.tracked import tracked
from llmtrain.telemetry.database import open_database
from llmtrain.telemetry.metrics import read

SERVED = ServedModel(
    parents=(),
    label="chat@1.2.0",
    name="chat",
    form="trained",
    path="chat/0123456789ab/model",
    weights_sha256="0" * 64,
    precision="fp32",
    context_tokens=128,
    stop_ids=(0,),
    template_sha256=None,
)


def test_each_start_is_a_run_of_the_tracker_with_the_last_counters(tmp_path: Path):
    place, tracking = tmp_path / "serving" / "chat", MLflowTracking.model_validate({"kind": "mlflow", "uri": None})
    for start in (1.0, 2.0):
        with tracked(SERVED, place, tracking, tmp_path, "litserve") as track:
            track({"serving/requests": start})
    with tracked(SERVED, place, tracking, tmp_path, "litserve"):
        pass  # nobody asked it anything: no run
    rows = [read(path) for path in sorted(place.rglob("metrics.jsonl"))]
    assert [[row["serving/requests"] for row in one] for one in rows] == [[1.0], [2.0], []]
    client = open_database(tmp_path)
    runs = client.search_runs([client.get_experiment_by_name("serving").experiment_id])
    assert sorted(run.data.metrics["serving/requests"] for run in runs) == [1.0, 2.0]
    assert {run.data.params["label"] for run in runs} == {"chat@1.2.0"}
    assert {run.info.status for run in runs} == {"FINISHED"}


def test_a_tracker_that_is_away_does_not_end_the_endpoint(tmp_path: Path, caplog):
    (tmp_path / "mlflow").write_text("a file where the database's directory should be")
    place, tracking = tmp_path / "serving", MLflowTracking.model_validate({"kind": "mlflow", "uri": None})
    with tracked(SERVED, place, tracking, tmp_path, "litserve") as track:
        track({"serving/requests": 1.0})
        track({"serving/requests": 2.0})
    assert caplog.text.count("serving metrics are in") == 1
    (rows,) = map(read, place.rglob("metrics.jsonl"))
    assert [row["serving/requests"] for row in rows] == [1.0, 2.0]
