"""What a killed and continued run must have in common with an uninterrupted one: all but times."""

import json
import sqlite3
from contextlib import closing
from pathlib import Path

import torch

from llmtrain.artifacts import ModelVersion
from llmtrain.files import sha256_of
from llmtrain.journal import Journal
from llmtrain.telemetry import vitals
from llmtrain.telemetry.metrics import read, without_times

WITH_TIMES = {
    *("metrics.jsonl", "curves.png", "report.html", "processes.json", "version.json"),
    *("mlflow_run_id", "state.pt", "manifest.json", "vitals.jsonl", "plan.json"),
}
"""Files of a run that hold times, or names that a tracker gave; their content is compared in other ways, or not."""


def the_run(directory: Path, name: str) -> Path:
    """The only run of the experiment `name`."""
    (run,) = (path for path in (directory / "outputs" / name).iterdir() if path.is_dir())
    return run


def assert_runs_equal(one: Path, other: Path, name: str) -> None:
    """The runs `name` in two working directories end in the same state, and each is told of once everywhere."""
    left, right = the_run(one, name), the_run(other, name)
    assert left.name == right.name, "the run id"
    assert_equal(checkpoint(left), checkpoint(right), "the last checkpoint")
    assert_equal(files(left), files(right), "the files")
    rows = [[without_times(row) for row in read(run / "metrics.jsonl")] for run in (left, right)]
    assert_equal(*rows, "metrics.jsonl")
    assert_equal(*(pulse(run) for run in (left, right)), "vitals.jsonl")
    assert [row["step"] for row in rows[0]] == sorted({row["step"] for row in rows[0]}), "a row is there twice"
    assert_equal(tracked(one)[left.name], tracked(other)[left.name], "the tracker")
    for directory, run in ((one, left), (other, right)):
        artifacts = directory / "outputs" / "mlflow" / "artifacts"
        assert [path.read_bytes() for path in artifacts.glob("**/metrics.jsonl")].count(
            (run / "metrics.jsonl").read_bytes()
        ) == 1, "the tracker's copy of metrics.jsonl"
        assert_told_once(directory, run)
        left_over = [str(path) for path in (directory / "outputs").rglob("*.writing*")]
        assert not left_over, f"half-written: {left_over}"


def pulse(run: Path) -> list[dict]:
    """The rows of vitals.jsonl without times."""
    return [vitals.without_times(row) for row in vitals.read(run / vitals.VITALS_FILE)]


def assert_same_order(one: Path, other: Path) -> None:
    """Each step trained on the same rows, however often it was done."""
    assert_equal(order(one), order(other), "the data of each step")


def assert_told_once(directory: Path, run: Path) -> None:
    """One version of the run in the registry, the journal and version.json; the journal's chain holds."""
    version = ModelVersion.read(run / "version.json")
    with closing(sqlite3.connect(directory / "outputs" / "mlflow" / "mlflow.db")) as database:
        query = "SELECT value FROM model_version_tags WHERE key = 'llmtrain.model_version'"
        registered = [ModelVersion.model_validate_json(value) for (value,) in database.execute(query)]
    assert [found for found in registered if found.model.run_id == run.name] == [version], "the registry"
    journal = Journal(directory / "outputs")
    journal.verify()
    told = [event["facts"] for event in journal.events() if event["event"] == "model.registered"]
    assert [facts["sha256"] for facts in told if facts["run_id"] == run.name] == [version.sha256], "the journal"


def order(directory: Path) -> dict[int, str]:
    """The hash of the rows that each step trained on; raises where a step, done again, saw others."""
    found: dict[int, str] = {}
    for line in (directory / "order.jsonl").read_text().splitlines():
        row = json.loads(line)
        assert found.setdefault(row["step"], row["sha256"]) == row["sha256"], f"step {row['step']} had two contents"
    return found


def checkpoint(run: Path) -> dict:
    """Weights, optimizer, clock and random generators at the last step, without times and the digits they take."""
    newest = sorted((run / "checkpoints").glob("step-*"))[-1]
    state = torch.load(newest / "state.pt", weights_only=True)
    del state["between"]["seconds"], state["between"]["metrics_bytes"], state["between"]["pulse"]["bytes"]
    return state


def files(run: Path) -> dict[str, str]:
    """By name: SHA-256, where the content has no times; what a link, such as `best`, points at."""
    found = {}
    for path in run.rglob("*"):
        if path.is_symlink():
            found[str(path.relative_to(run))] = str(path.readlink())
        elif path.is_file() and path.name != "plan_vs_actual.json":  # only a process that ends its training writes it
            found[str(path.relative_to(run))] = "" if path.name in WITH_TIMES else sha256_of(path)
    return found


def tracked(directory: Path) -> dict[str, list]:
    """By run id: the tracker's status, params and metrics, times aside; raises where a run is there twice."""
    found = {}
    with closing(sqlite3.connect(directory / "outputs" / "mlflow" / "mlflow.db")) as database:
        query = "SELECT run_uuid, status, tags.value FROM runs JOIN tags USING (run_uuid) WHERE key = 'llmtrain.run_id'"
        for tracker_id, status, run_id in database.execute(query).fetchall():
            assert run_id not in found, "two tracker runs for one run"
            params = database.execute("SELECT key, value FROM params WHERE run_uuid = ? ORDER BY key", (tracker_id,))
            metrics = database.execute(
                "SELECT key, step, value FROM metrics "
                "WHERE run_uuid = ? AND key NOT LIKE '%_per_second' ORDER BY key, step",
                (tracker_id,),
            )
            found[run_id] = [status, params.fetchall(), metrics.fetchall()]
    return found


def assert_equal(one, other, place: str = "") -> None:
    """Equal to the bit, tensors in nested containers too; `place` names the first difference."""
    assert type(one) is type(other), place
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other), place
    elif isinstance(one, dict):
        assert one.keys() == other.keys(), f"{place}: {sorted(one.keys() ^ other.keys())} only in one of the two"
        for key in one:
            assert_equal(one[key], other[key], f"{place}: {key}")
    elif isinstance(one, list | tuple):
        assert len(one) == len(other), f"{place}: {len(one)} and {len(other)} entries"
        for index, (left, right) in enumerate(zip(one, other, strict=True)):
            assert_equal(left, right, f"{place}[{index}]")
    else:
        assert one == other, f"{place}: {one} and {other}"
