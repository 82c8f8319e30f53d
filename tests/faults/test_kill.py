"""`kill -9` and the same command again: the run ends as if nothing had happened."""

import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from llmtrain.telemetry.metrics import read, without_times

PRETRAIN = (
    "model=qwen3_tiny",
    "model.attention_dropout=0.1",  # draws from the random generator at every step
    "data=text_files",
    "data.corpus.paths=[text/*.txt]",
    "data.corpus.licence=PSF-2.0",
    "infra.precision=fp32",
    "trainer.budget_tokens=12_288",
    "trainer.sequence_tokens=64",
    "trainer.batch_rows=4",
    "trainer.warmup_tokens=1_000",
    "trainer.log_every_tokens=500",  # no multiple of a step: rows and checkpoints fall apart
    "trainer.evaluate_every_tokens=1_500",
    "trainer.checkpoint_every_tokens=1_024",
)
DPO = (
    "trainer=dpo",
    "model=qwen3_tiny",
    "data.corpus={kind: files, paths: [text/*.txt], licence: PSF-2.0}",
    "data.pairs={kind: continuations, prompt_characters: 60, answer_characters: 40, max_training_pairs: 40}",
    "trainer.epochs=1",
    "trainer.batch_rows=4",
    "trainer.warmup_tokens=500",
    "trainer.log_every_tokens=500",
    "trainer.evaluate_every_tokens=4_000",
    "trainer.checkpoint_every_tokens=1_000",
    "infra.precision=fp32",
)


def text(directory: Path) -> None:
    """60 documents of the running interpreter's own documentation."""
    from pydoc_data.topics import topics

    (directory / "text").mkdir(parents=True)
    for number, (_, topic) in enumerate(sorted(topics.items(), key=lambda item: -len(item[1]))[:60]):
        (directory / "text" / f"{number:02}.txt").write_text(topic[:4000])


def train(repository: Path, directory: Path, overrides: tuple[str, ...], kill_at: str = "") -> subprocess.Popen:
    environment = os.environ | {"KILL_AT": kill_at, "PYTHONPATH": str(Path(__file__).parent), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(repository / "train.py"), *overrides]
    return subprocess.Popen(
        command, cwd=directory, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def finish(process: subprocess.Popen) -> tuple[int, str]:
    out, err = process.communicate(timeout=300)
    return process.returncode, out + err


def the_run(directory: Path, name: str) -> Path:
    (run,) = (path for path in (directory / "outputs" / name).iterdir() if path.is_dir())
    return run


def last_state(run: Path) -> dict:
    newest = sorted((run / "checkpoints").glob("step-*"))[-1]
    return torch.load(newest / "state.pt", weights_only=True)


def assert_equal(one, other, place: str = "") -> None:
    assert type(one) is type(other), place
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other), place
    elif isinstance(one, dict):
        assert one.keys() == other.keys(), place
        for key in one:
            assert_equal(one[key], other[key], f"{place}.{key}")
    elif isinstance(one, list | tuple):
        assert len(one) == len(other), place
        for index, (left, right) in enumerate(zip(one, other, strict=True)):
            assert_equal(left, right, f"{place}[{index}]")
    else:
        assert one == other, place


def tracked(directory: Path) -> dict[str, list]:
    """The tracker's metrics by run name's tag, times aside; raises where a run is there twice."""
    with sqlite3.connect(directory / "outputs" / "mlflow" / "mlflow.db") as database:
        runs = database.execute("SELECT run_uuid, value FROM tags WHERE key = 'llmtrain.run_id'").fetchall()
        assert len({run_id for _, run_id in runs}) == len(runs), "two tracker runs for one run"
        query = (
            "SELECT key, step, value FROM metrics WHERE run_uuid = ? AND key NOT LIKE '%_per_second' ORDER BY key, step"
        )
        return {run_id: database.execute(query, (tracker_id,)).fetchall() for tracker_id, run_id in runs}


def assert_runs_equal(one: Path, other: Path, name: str) -> None:
    """Weights, optimizer, clock, random generators, metrics and tracker of the one run that each directory has."""
    left, right = the_run(one, name), the_run(other, name)
    assert left.name == right.name  # the run id
    weights = "model/model.safetensors"
    assert (left / weights).read_bytes() == (right / weights).read_bytes()
    states = [last_state(run) for run in (left, right)]
    for state in states:
        state["between"].pop("seconds"), state["between"].pop("metrics_bytes")  # times, and the digits they take
    assert_equal(*states)
    rows = [[without_times(row) for row in read(run / "metrics.jsonl")] for run in (left, right)]
    assert rows[0] == rows[1]
    assert [row["step"] for row in rows[0]] == sorted({row["step"] for row in rows[0]}), "a row is there twice"
    assert tracked(one)[left.name] == tracked(other)[left.name]


@pytest.fixture(scope="module")
def uninterrupted(repository: Path, tmp_path_factory) -> Path:
    """A directory with both runs, as nothing disturbed them."""
    directory = tmp_path_factory.mktemp("uninterrupted")
    text(directory)
    for overrides in (PRETRAIN, DPO):
        code, output = finish(train(repository, directory, overrides))
        assert code == 0, output
    return directory


def test_six_kills_two_of_them_inside_a_save_leave_no_trace_in_pretraining(repository, uninterrupted, tmp_path):
    text(tmp_path)
    for kill_at in ("row:1", "fsync:2", "saved:3", "row:7", "fsync:4", "saved:1"):
        code, output = finish(train(repository, tmp_path, PRETRAIN, kill_at))
        assert code == -signal.SIGKILL, output
        assert f"KILLED at {kill_at.replace(':', ' ')}" in output
        if kill_at.startswith("fsync"):
            assert list(the_run(tmp_path, "qwen3_tiny-pretrain").glob("checkpoints/*.writing"))
    code, output = finish(train(repository, tmp_path, PRETRAIN))
    assert code == 0, output
    assert "continuing from step-" in output
    assert_runs_equal(uninterrupted, tmp_path, "qwen3_tiny-pretrain")
    assert not list(the_run(tmp_path, "qwen3_tiny-pretrain").glob("checkpoints/*.writing"))


def test_kills_leave_no_trace_in_preference_tuning(repository, uninterrupted, tmp_path):
    text(tmp_path)
    assert finish(train(repository, tmp_path, PRETRAIN))[0] == 0
    for kill_at in ("row:2", "fsync:5"):
        code, output = finish(train(repository, tmp_path, DPO, kill_at))
        assert code == -signal.SIGKILL, output
    code, output = finish(train(repository, tmp_path, DPO))
    assert code == 0, output
    assert_runs_equal(uninterrupted, tmp_path, "qwen3_tiny-dpo")


def test_ctrl_c_saves_and_exits_130_and_the_same_command_continues(repository, uninterrupted, tmp_path):
    text(tmp_path)
    process = train(repository, tmp_path, PRETRAIN)
    runs = tmp_path / "outputs" / "qwen3_tiny-pretrain"
    deadline = time.monotonic() + 120
    while not list(runs.glob("*/checkpoints/step-*")) and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)
    code, output = finish(process)
    assert code == 130, output
    assert "Traceback" not in output
    assert "the same command continues" in output
    assert not (the_run(tmp_path, "qwen3_tiny-pretrain") / "version.json").exists()
    code, output = finish(train(repository, tmp_path, PRETRAIN))
    assert code == 0, output
    assert "continuing from step-" in output
    assert_runs_equal(uninterrupted, tmp_path, "qwen3_tiny-pretrain")


def test_a_finished_run_says_so_and_again_makes_another_in_outputs_that_were_copied(
    repository, uninterrupted, tmp_path
):
    copy = tmp_path / "copy"
    shutil.copytree(uninterrupted, copy, symlinks=True)
    code, output = finish(train(repository, copy, PRETRAIN))
    assert code == 0, output
    assert "is finished: qwen3_tiny-pretrain@1.0.0" in output
    before = len(tracked(copy))
    code, output = finish(train(repository, copy, (*PRETRAIN, "--again")))
    assert code == 0, output
    assert "registered qwen3_tiny-pretrain@1.0.1" in output
    assert len(tracked(copy)) == before + 1
    assert len(tracked(uninterrupted)) == before
