"""Ranks on the real command line: interrupted, killed, and swept."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from llmtrain.telemetry.metrics import read
from tests.faults.commands import PRETRAIN, files
from tests.faults.runs import text

RANKS = [*PRETRAIN, "infra.ranks=2", *files("text/*.txt"), "trainer.sample_tokens=0", "trainer.log_every_tokens=256"]
LONG = [
    *RANKS,
    "trainer.budget_tokens=20_480",  # 80 steps
    "trainer.evaluate_every_tokens=1_000_000",
    "trainer.checkpoint_every_tokens=1_024",
]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("ranks")
    text(directory, num_documents=24, characters=2000)
    return directory


def start(repository: Path, directory: Path, overrides: list[str], said: Path) -> subprocess.Popen[bytes]:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with said.open("wb") as stream:
        return subprocess.Popen(
            [sys.executable, str(repository / "train.py"), *overrides],
            cwd=directory, env=environment, stdout=stream, stderr=subprocess.STDOUT,
        )  # fmt: skip


def ranks_of(process: subprocess.Popen[bytes]) -> dict[int, int]:
    """The processes that are ranks of a launcher, by their number."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    found = {}
    for child in children:
        environment = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
        found |= {int(entry[5:]): int(child) for entry in environment if entry.startswith(b"RANK=")}
    return found


def wait_for(process: subprocess.Popen[bytes], directory: Path, saved: int) -> None:
    """Until a checkpoint with at least `saved` steps is there."""
    end = time.monotonic() + 300
    while time.monotonic() < end and process.poll() is None:
        steps = [int(path.name[5:]) for path in directory.glob("outputs/*/*/checkpoints/step-*[0-9]")]
        if max(steps, default=0) >= saved:
            return
        time.sleep(0.01)
    raise AssertionError("no such checkpoint came")


def test_ctrl_c_saves_a_killed_rank_stops_all_within_seconds_and_the_same_command_ends_the_run(repository, prepared):
    said = prepared / "said.txt"
    process = start(repository, prepared, LONG, said)
    wait_for(process, prepared, saved=4)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=200) == 130, said.read_text()
    assert "the same command continues" in said.read_text()
    assert "Traceback" not in said.read_text()

    process = start(repository, prepared, LONG, said)
    [interrupted] = {max(int(path.name[5:]) for path in prepared.glob("outputs/*/*/checkpoints/step-*[0-9]"))}
    wait_for(process, prepared, saved=interrupted + 4)
    ranks = ranks_of(process)
    assert sorted(ranks) == [0, 1]
    killed_at = time.monotonic()
    os.kill(ranks[1], signal.SIGKILL)
    assert process.wait(timeout=200) == 75, said.read_text()
    assert time.monotonic() - killed_at < 15
    assert f"rank 1 (process {ranks[1]}) was killed by SIGKILL" in said.read_text()
    assert "the same command continues" in said.read_text()
    assert not any(Path(f"/proc/{pid}").exists() for pid in ranks.values())

    process = start(repository, prepared, LONG, said)
    assert process.wait(timeout=400) == 0, said.read_text()
    assert "continuing from step-" in said.read_text()
    [run] = prepared.glob("outputs/*/*/version.json")
    assert [row["step"] for row in read(run.parent / "metrics.jsonl")] == list(range(1, 81))
    assert not list(run.parent.rglob("*.writing"))


def test_a_two_by_two_sweep_of_two_ranks_leaves_four_run_directories(repository, prepared):
    said = prepared / "said.txt"
    sweep = ["-m", *RANKS, "name=sweep", "trainer.lr=1e-3,2e-3", "trainer.seed=0,1"]
    assert start(repository, prepared, sweep, said).wait(timeout=800) == 0, said.read_text()
    runs = list((prepared / "outputs" / "sweep").iterdir())
    assert len(runs) == 4
    assert all((run / "version.json").exists() for run in runs)
    expected = {"outputs", "text", "said.txt"}
    assert {path.name for path in prepared.iterdir()} == expected, "and nothing else beside them"
