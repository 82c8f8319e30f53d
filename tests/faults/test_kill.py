"""`kill -9` and the same command again: the run ends as if nothing had happened."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from random import Random

import pytest

from tests.faults import forkserver
from tests.faults.campaign import OUTSIDE, Kills, Original, campaign, chain, kill, uninterrupted
from tests.faults.compare import assert_runs_equal, assert_same_order, the_run, tracked
from tests.faults.moments import Moment
from tests.faults.runs import DPO, DPO_NAME, PRETRAIN, PRETRAIN_NAME, text

IN_CI = {
    "preparation": 1,
    "start": 1,
    "in a step": 4,
    "after a step": 1,
    "in validation": 4,
    "in a save": 5,
    "between save and evaluation": 4,
    "ending": 3,
    OUTSIDE: 2,
}
IN_FULL = {
    "preparation": 25,
    "start": 25,
    "in a step": 40,
    "after a step": 15,
    "in validation": 40,
    "in a save": 50,
    "between save and evaluation": 40,
    "ending": 40,
    OUTSIDE: 25,
}


@pytest.fixture(scope="module")
def pretraining(server, tmp_path_factory) -> Original:
    directory = tmp_path_factory.mktemp("pretraining")
    text(directory / "beginning", num_documents=24, characters=2000)
    assert forkserver.finish(forkserver.start(forkserver.create_database, directory / "beginning")) == 0
    return uninterrupted(PRETRAIN_NAME, PRETRAIN, directory / "beginning", directory / "end")


@pytest.fixture(scope="module")
def preference_tuning(pretraining, tmp_path_factory) -> Original:
    directory = tmp_path_factory.mktemp("preference-tuning")
    shutil.copytree(pretraining.end, directory / "beginning", symlinks=True)
    (directory / "beginning" / "order.jsonl").unlink()
    return uninterrupted(DPO_NAME, DPO, directory / "beginning", directory / "end")


def test_the_fork_server_has_imported_everything_and_has_run_nothing(server, tmp_path):
    assert forkserver.finish(forkserver.start(forkserver.server_state, tmp_path)) == 0
    state = json.loads((tmp_path / "state.json").read_text())
    assert state["modules"] == list(forkserver.PRELOADED)
    of_arrow = "jemalloc_bg_thd"  # its allocator's, which knows of forks
    assert len([name for name in state["threads"] if name != of_arrow]) == 1
    assert not [file for file in state["files"] if ".db" in file]


def test_kills_in_every_phase_leave_no_trace(pretraining, preference_tuning, tmp_path, show_kills):
    kills = campaign([pretraining, preference_tuning], Counter(IN_CI), tmp_path, seed=1)
    show_kills(kills.table())
    assert kills.done.total() >= 20
    for phase in ("in a step", "in validation", "in a save", "between save and evaluation"):
        assert kills.count(phase) >= 4


@pytest.mark.campaign
@pytest.mark.timeout(3600)
def test_300_kills_leave_no_trace(pretraining, preference_tuning, tmp_path, show_kills):
    kills = campaign([pretraining, preference_tuning], Counter(IN_FULL), tmp_path, seed=2)
    show_kills(kills.table())
    assert kills.done.total() == 300


@pytest.mark.campaign
def test_kills_while_the_tracking_database_is_created_leave_no_trace(pretraining, tmp_path, show_kills):
    (tmp_path / "beginning").mkdir()
    shutil.copytree(pretraining.beginning / "text", tmp_path / "beginning" / "text")
    original = uninterrupted(PRETRAIN_NAME, PRETRAIN, tmp_path / "beginning", tmp_path / "end")
    kills, random = Kills(), Random(3)
    for number in range(3):
        assert not chain(original, ["start"] * 4, tmp_path / str(number), random, kills)
    show_kills(kills.table())


def test_a_kill_right_after_the_last_save_leaves_best_and_older_checkpoints_as_they_should_be(pretraining, tmp_path):
    shutil.copytree(pretraining.beginning, tmp_path / "run")
    boundaries = [extent for extent in pretraining.extents if extent.phase == "between save and evaluation"]
    kill(pretraining, tmp_path / "run", Moment("between save and evaluation", len(boundaries), "any", 1))
    assert forkserver.finish(forkserver.start(forkserver.train, tmp_path / "run", PRETRAIN)) == 0
    assert_runs_equal(pretraining.end, tmp_path / "run", PRETRAIN_NAME)


def test_packed_documents_muon_and_wsd_continue_to_the_same_bits(pretraining, tmp_path):
    overrides = (*PRETRAIN, "trainer.packing=documents", "trainer.optimizer=muon", "trainer.schedule=wsd")
    original = uninterrupted(PRETRAIN_NAME, overrides, pretraining.beginning, tmp_path / "end")
    shutil.copytree(pretraining.beginning, tmp_path / "run")
    kill(original, tmp_path / "run", Moment("in a step", 12, "any", 1500))
    assert forkserver.finish(forkserver.start(forkserver.train, tmp_path / "run", overrides)) == 0
    assert_runs_equal(original.end, tmp_path / "run", PRETRAIN_NAME)
    assert_same_order(original.end, tmp_path / "run")


def test_without_its_random_generators_a_continued_run_is_another_one(pretraining, tmp_path):
    """The control: the comparison sees what it is there to see."""
    shutil.copytree(pretraining.beginning, tmp_path / "run")
    kill(pretraining, tmp_path / "run", Moment("in a step", 9, "any", 2000))
    assert forkserver.finish(forkserver.start(forkserver.train, tmp_path / "run", PRETRAIN, None, False)) == 0
    with pytest.raises(AssertionError, match="the last checkpoint: state_dict: model"):
        assert_runs_equal(pretraining.end, tmp_path / "run", PRETRAIN_NAME)


def test_a_kill_whose_moment_does_not_come_is_an_error(pretraining, tmp_path):
    shutil.copytree(pretraining.end, tmp_path / "run", symlinks=True)
    with pytest.raises(AssertionError, match=r"did not come \(0\)"):
        kill(pretraining, tmp_path / "run", Moment("in a step", 1, "any", 1))


def test_real_processes_ctrl_c_saves_and_exits_130_a_kill_loses_nothing_and_the_same_command_continues(
    repository, pretraining, tmp_path
):
    directory = tmp_path / "run"
    shutil.copytree(pretraining.beginning, directory)
    saved = "outputs/*/*/checkpoints/step-*"
    code, output = stopped(repository, directory, signal.SIGINT, lambda: list(directory.glob(saved)))
    assert code == 130, output
    assert "Traceback" not in output
    assert "the same command continues" in output
    run = the_run(directory, PRETRAIN_NAME)
    assert not (run / "version.json").exists()
    journal = directory / "outputs" / "journal.jsonl"
    code, output = stopped(repository, directory, signal.SIGKILL, lambda: "run.continued" in journal.read_text())
    assert code == -signal.SIGKILL, output
    assert "continuing from step-" in output
    assert not (run / "version.json").exists()
    assert forkserver.finish(forkserver.start(forkserver.train, directory, PRETRAIN)) == 0
    assert_runs_equal(pretraining.end, directory, PRETRAIN_NAME)


def stopped(
    repository: Path, directory: Path, number: signal.Signals, moment_has_come: Callable[[], object]
) -> tuple[int, str]:
    """Start `python train.py` and send it a signal; returns exit code and output."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(repository / "train.py"), *PRETRAIN]
    with (directory / "said.txt").open("w+") as said:
        process = subprocess.Popen(command, cwd=directory, env=environment, stdout=said, stderr=subprocess.STDOUT)
        while process.poll() is None and not moment_has_come():
            time.sleep(0.005)
        process.send_signal(number)
        process.wait(timeout=300)
        said.seek(0)
        return process.returncode, said.read()


def test_a_finished_run_says_so_and_again_makes_another_in_outputs_that_were_copied(pretraining, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(pretraining.end, copy, symlinks=True)
    before = tracked(copy)
    (copy / "output.txt").unlink()
    assert forkserver.finish(forkserver.start(forkserver.train, copy, PRETRAIN)) == 0
    assert "is finished: qwen3_tiny-pretrain@1.0.0" in (copy / "output.txt").read_text()
    assert forkserver.finish(forkserver.start(forkserver.train, copy, (*PRETRAIN, "--again"))) == 0
    assert "registered qwen3_tiny-pretrain@1.0.1" in (copy / "output.txt").read_text()
    after = tracked(copy)
    assert len(after) == len(before) + 1
    assert before.items() <= after.items()
    assert tracked(pretraining.end) == before
