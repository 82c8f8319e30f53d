"""metrics.jsonl: what is read is what was written, and a resume cuts exactly the rows after its checkpoint."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmtrain.errors import IntegrityError
from llmtrain.telemetry.metrics import MetricsFile, read, without_times


@given(value=st.floats(allow_nan=False))
def test_floats_come_back_bit_for_bit(tmp_path_factory, value):
    path = tmp_path_factory.mktemp("metrics") / "metrics.jsonl"
    MetricsFile(path).append({"step": 1, "train/loss": value})
    assert math.copysign(1, read(path)[0]["train/loss"]) == math.copysign(1, value)
    assert read(path) == [{"step": 1, "train/loss": value}]


def test_nan_comes_back_and_the_line_is_json_of_the_standard(tmp_path):
    MetricsFile(tmp_path / "metrics.jsonl").append({"step": 1, "train/loss": math.nan})
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1, "train/loss": "NaN"}\n'
    assert math.isnan(read(tmp_path / "metrics.jsonl")[0]["train/loss"])


def test_truncating_to_a_checkpoints_size_leaves_the_rows_before_it(tmp_path):
    path = tmp_path / "metrics.jsonl"
    metrics = MetricsFile(path)
    metrics.append({"step": 1})
    size = metrics.size
    metrics.append({"step": 2})
    metrics.close()
    resumed = MetricsFile(path)
    resumed.truncate(size)
    resumed.append({"step": 22})
    assert size == len(b'{"step": 1}\n')
    assert read(path) == [{"step": 1}, {"step": 22}]


def test_rows_missing_before_the_checkpoint_are_not_filled_with_zeros(tmp_path):
    metrics = MetricsFile(tmp_path / "metrics.jsonl")
    metrics.append({"step": 1})
    with pytest.raises(IntegrityError, match=r"has 12 bytes, but the checkpoint was written after 13"):
        metrics.truncate(13)
    assert metrics.size == 12


def test_a_torn_last_line_is_no_row(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2')
    assert read(tmp_path / "metrics.jsonl") == [{"step": 1}]


def test_a_damaged_line_is_named(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"st\n{"step": 3}\n')
    with pytest.raises(IntegrityError, match=r"metrics\.jsonl:2: not a row"):
        read(tmp_path / "metrics.jsonl")


def test_no_file_has_no_rows(tmp_path):
    assert read(tmp_path / "metrics.jsonl") == []


def test_two_runs_are_compared_without_their_times():
    row = {"step": 3, "tokens": 30, "time_utc": "2026-01-01", "seconds": 1.5, "train/loss": 2.0}
    assert without_times({**row, "train/tokens_per_second": 9.0}) == {"step": 3, "tokens": 30, "train/loss": 2.0}
