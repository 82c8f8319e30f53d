"""Runs that are left to a supervisor on this machine: `--detach`, and `llmtrain jobs` over them."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from llmtrain.artifacts import ModelVersion

TINY = [
    *("experiment=smoke", "tracking=none", "infra.precision=fp32", "infra.threads=1", "trainer.budget_tokens=20_000"),
    *("trainer.log_every_tokens=2_000", "trainer.checkpoint_every_tokens=4_000"),
]
LONG = "trainer.budget_tokens=4_000_000"


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working directory in which seed 1 was trained in the foreground."""
    directory = tmp_path_factory.mktemp("detached")
    command(directory, "train", *TINY, "trainer.seed=1", "outputs_dir=foreground")
    return directory


def command(directory: Path, *words: str, code: int = 0) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "llmtrain", *words], cwd=directory, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == code, f"{words}: {done.returncode}\n{done.stdout}{done.stderr}"
    assert "Traceback" not in done.stderr
    return done.stdout + done.stderr


def submit(directory: Path, *words: str) -> str:
    [sweep] = re.findall(r"^sweep (\w+):", command(directory, "train", "--detach", *words), re.MULTILINE)
    return sweep


def jobs(directory: Path, sweep: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(command(directory, "jobs", sweep, "--json"))
    return found


def under_way(directory: Path, sweep: str) -> dict[str, Any]:
    """The first run of the sweep, once it has a checkpoint."""
    [run, *_] = jobs(directory, sweep)
    for _ in range(900):
        if list((directory / run["directory"] / "checkpoints").glob("step-*[0-9]")):
            return jobs(directory, sweep)[0]
        time.sleep(0.1)
    raise AssertionError((directory / run["directory"] / "log.txt").read_text())


def test_a_detached_sweep_ends_as_in_the_foreground(here: Path):
    seeds = ("-m", *TINY, "trainer.seed=1,2", "infra.launch.parallel=2")
    shown = command(here, "train", *seeds, "--detach", "--dry-run")
    assert shown.count("-m llmtrain.launch.work ") == 2
    sweep = submit(here, *seeds)
    assert "2 of 2 have ended" in command(here, "jobs", "wait", sweep)
    first, second = jobs(here, sweep)
    assert (first["state"], second["state"]) == ("finished", "finished")
    assert first["tokens"] == first["total_tokens"] > 19_000
    assert first["loss"] < 6.2
    (foreground,) = here.glob("foreground/smoke/*/version.json")
    assert foreground.parent.name == first["run"]
    weights = [
        ModelVersion.read(path).model.weights_sha256
        for path in (foreground, here / first["directory"] / "version.json")
    ]
    assert weights[0] == weights[1]
    assert f"{sweep}  local" in command(here, "jobs")
    assert command(here, "jobs", sweep[:4]).count("finished") == 2
    assert "registered smoke@" in command(here, "jobs", "logs", "-f", sweep, second["run"])


@pytest.mark.campaign
def test_a_run_is_cancelled_and_goes_on_when_it_is_asked_for_again(here: Path):
    sweep = submit(here, *TINY, LONG)
    run = under_way(here, sweep)
    assert run["state"] == "running"
    assert run["node"] == os.uname().nodename
    assert run["eta_seconds"] > 0
    assert command(here, "jobs", "cancel", sweep) == "1 told to stop\n"
    assert "stopped: cancelled" in command(here, "jobs", "wait", sweep, code=3)
    assert submit(here, *TINY, LONG) == sweep
    log = here / run["directory"] / "log.txt"
    for _ in range(900):
        if "continuing from step-" in log.read_text():
            break
        time.sleep(0.1)
    assert jobs(here, sweep)[0]["state"] == "running"
    assert "another process" not in log.read_text()
    command(here, "jobs", "cancel", sweep)
    command(here, "jobs", "wait", sweep, code=3)
    assert log.read_text().count("continuing from step-") == 1


def test_a_killed_run_is_started_again_and_a_killed_supervisor_is_told_of(here: Path):
    sweep = submit(here, *TINY, LONG, "trainer.seed=9")
    run = under_way(here, sweep)
    directory = here / run["directory"]
    first = json.loads((directory / "starts.jsonl").read_text().splitlines()[0])
    os.kill(first["pid"], signal.SIGKILL)
    for _ in range(600):
        lines = (directory / "starts.jsonl").read_text().splitlines()
        if len(lines) == 2:
            break
        time.sleep(0.1)
    assert json.loads(lines[1])["step"] > 0
    (status,) = (here / "outputs" / "sweeps" / sweep).glob("local-*.json")
    os.kill(json.loads(status.read_text())["supervisor"][0], signal.SIGKILL)
    assert "failed: its supervisor has gone" in command(here, "jobs", "wait", sweep, code=3)
    second = json.loads(lines[1])["pid"]
    for _ in range(300):  # it does not go on without a supervisor
        if not Path(f"/proc/{second}/exe").exists():
            break
        time.sleep(0.1)
    assert not Path(f"/proc/{second}/exe").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["jobs", "ffff"], "ffff: no such sweep in outputs"),
        (["jobs", "wait"], "llmtrain jobs wait needs a sweep"),
        (["jobs", "-f"], "--follow goes with `llmtrain jobs logs`"),
        (["train", *TINY, "infra=slurm_cpu", "trainer=dpo", "budget=1"], "budget: no such setting"),
        (
            ["train", "-m", *TINY, "infra=local_cpu,slurm_cpu", "--dry-run"],
            "the points of a sweep differ in infra.launch or infra.ranks",
        ),
    ],
)
def test_what_cannot_be_done_is_said(here: Path, words: list[str], said: str):
    assert said in command(here, *words, code=2)
