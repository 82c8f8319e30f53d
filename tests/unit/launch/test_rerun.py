"""What a rerun says about the machine, the code and the result; tests/e2e/test_sweeps.py makes a run again."""

import json
from pathlib import Path

import pytest

from llmtrain.artifacts import TrainedModel
from llmtrain.cli.main import main
from llmtrain.launch import rerun
from llmtrain.report.records import Process, Processes

NOW = {"CPU": "fast", "cores": "8", "torch": "2.13.0", "llmtrain": "1", "commit": "abc"}


def ran(directory: Path, weights: str, losses: list[float]) -> Path:
    """A finished run with those weights and training losses."""
    directory.mkdir()
    fields = dict.fromkeys(TrainedModel.model_fields, "x") | {"parents": (), "num_tokens_seen": 9, "trainer": "dpo"}
    record = {**fields, "weights_sha256": weights, "metrics": {"test/loss": losses[-1]}}
    TrainedModel.model_validate(record).write(directory / "trained.json")
    rows = [{"step": step, "tokens": 100 * step, "seconds": hash(str(directory)) % 9, "train/loss": loss}
            for step, loss in enumerate(losses, 1)]  # fmt: skip
    (directory / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return directory


def compared(one: Path, other: Path) -> tuple[bool, list[str]]:
    said: list[str] = []
    return rerun.compare(one, other, said.append), said


def test_equal_weights_and_rows_are_bit_equal_whatever_the_times(tmp_path: Path):
    one, other = (ran(tmp_path / name, "a" * 64, [3.0, 2.0]) for name in ("one", "other"))
    assert compared(one, other) == (True, ["bit-equal: weights aaaaaaaaaaaa, and 2 rows of metrics"])


def test_where_two_runs_part(tmp_path: Path):
    one = ran(tmp_path / "one", "a" * 64, [3.0, 2.0])
    assert compared(one, ran(tmp_path / "other", "b" * 64, [3.0, 2.5])) == (
        False,
        [
            "not bit-equal: weights different (aaaaaaaaaaaa and bbbbbbbbbbbb)",
            "the metrics part at step 2, 200 tokens",
            "  test/loss: 2 before, 2.5 now",
        ],
    )
    assert not compared(one, ran(tmp_path / "shorter", "a" * 64, [3.0]))[0]


def test_a_run_that_has_not_finished_has_no_result(tmp_path: Path):
    (tmp_path / "one").mkdir()
    equal, said = compared(tmp_path / "one", ran(tmp_path / "other", "a" * 64, [1.0]))
    assert not equal
    assert said == [f"{tmp_path / 'one'} has not finished: there is no result to compare with"]


def test_what_differs_of_code_versions_and_hardware(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    before = {**NOW, "cores": "2", "torch": "2.12.0", "commit": "def", "GPU": "none"}
    process = Process(started_at_utc="2026-01-01T00:00:00", machine=before, seconds={}, tokens=0)
    Processes(processes=(process,)).write(tmp_path / "processes.json")
    monkeypatch.setattr(rerun, "machine", lambda: NOW)
    assert list(map(str, rerun.differences_of(tmp_path))) == [
        "hardware: cores was 2, is 8",
        "versions: torch was 2.12.0, is 2.13.0",
        "code: commit was def, is abc",
        "hardware: GPU was none, is not there",
    ]


def test_what_is_no_run_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["rerun", str(tmp_path)]) == 2
    assert "no frozen config to start from" in capsys.readouterr().err
    assert main(["rerun"]) == 2
    assert "needs one run's directory" in capsys.readouterr().err
