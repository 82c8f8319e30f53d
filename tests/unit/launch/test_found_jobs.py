"""What an engine has of a submission that was killed before it could say so."""

import json
import os
from pathlib import Path

import pytest
from submitit.core.utils import DelayedSubmission, JobPaths

from llmtrain.config.compose import load_config
from llmtrain.config.frozen import FrozenRun
from llmtrain.launch.engine import Run
from llmtrain.launch.local import LocalEngine, supervise
from llmtrain.launch.slurm import SlurmEngine, Task
from llmtrain.processes import started
from tests.unit.launch.stand_ins import RESOLVED


def run_at(directory: Path, *overrides: str) -> Run:
    return Run(directory, FrozenRun(config=load_config(list(overrides)), resolved=RESOLVED, attempt=1))


def status(file: Path, directory: Path, supervisor: list[object] | None, state: str = "running") -> None:
    runs = [{"directory": str(directory), "state": state}]
    file.write_text(json.dumps({"parallel": 1, "restarts": 0, "supervisor": supervisor, "runs": runs}))


def test_a_supervisor_that_lives_has_its_runs(tmp_path: Path):
    run = run_at(tmp_path / "run")
    file = tmp_path / "local-1.json"
    status(file, run.directory, [os.getpid(), started(os.getpid())])
    assert LocalEngine().find(tmp_path, [run]) == {run.directory: f"{file}#0"}
    assert LocalEngine().find(tmp_path, [run_at(tmp_path / "other")]) == {}


@pytest.mark.parametrize(
    ("supervisor", "state"), [([1, "0"], "running"), ([os.getpid(), started(os.getpid())], "ended")]
)
def test_one_that_has_gone_or_a_run_that_has_ended_is_not_found(
    tmp_path: Path, supervisor: list[object], state: str
):  # fmt: skip
    run = run_at(tmp_path / "run")
    status(tmp_path / "local-1.json", run.directory, supervisor, state)
    assert LocalEngine().find(tmp_path, [run]) == {}


def test_a_run_that_is_being_cancelled_is_not_found(tmp_path: Path):
    run = run_at(tmp_path / "run")
    status(tmp_path / "local-1.json", run.directory, [os.getpid(), started(os.getpid())])
    (tmp_path / "local-1.cancel-0").touch()
    assert LocalEngine().find(tmp_path, [run]) == {}


def test_a_supervisor_that_has_not_come_up_starts_nothing_when_it_does(tmp_path: Path):
    run = run_at(tmp_path / "run")
    file = tmp_path / "local-1.json"
    status(file, run.directory, None)
    assert LocalEngine().find(tmp_path, [run]) == {}
    supervise(file)
    assert not file.exists()
    assert not run.directory.exists()


def test_slurm_is_asked_by_the_sweeps_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    runs = [run_at(tmp_path / str(number), "infra=slurm") for number in range(3)]
    for handle, run in zip(("7_0", "7_1", "8"), runs, strict=True):
        paths = JobPaths(tmp_path / "abcd" / "slurm", handle)
        paths.folder.mkdir(parents=True, exist_ok=True)
        DelayedSubmission(Task(3), str(run.directory)).dump(paths.submitted_pickle)
    squeue = tmp_path / "bin" / "squeue"
    squeue.parent.mkdir()
    squeue.write_text(
        '#!/bin/sh\ncase "$*" in *--name=llmtrain-abcd*) ;; *) exit 1 ;; esac\n'
        'printf "7_0|RUNNING|n1|None\\n7_1|COMPLETING|n1|None\\n8|PENDING||Resources\\n9|PENDING||Resources\\n"\n'
    )
    squeue.chmod(0o755)
    monkeypatch.setenv("PATH", f"{squeue.parent}:{os.environ['PATH']}")
    launch = runs[0].infra.launch
    assert launch.kind == "slurm"
    assert SlurmEngine(launch).find(tmp_path / "abcd", runs) == {runs[0].directory: "7_0", runs[2].directory: "8"}
