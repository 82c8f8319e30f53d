"""Runs and sweeps on a real Slurm of one node (scripts/slurm-up): preempted, requeued, killed, and equal in the end.

Those marked `campaign` run with scripts/test-full: they take minutes.
"""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from llmtrain.artifacts import ModelVersion
from llmtrain.launch.search import SearchDirectory
from llmtrain.launch.starts import starts
from llmtrain.launch.sweeps import all_sweeps
from llmtrain.telemetry.metrics import read, without_times
from tests.faults.compare import tracked

ROOT = Path(__file__).parents[2]
TINY = [
    "experiment=smoke",
    "infra.precision=fp32",
    "infra.threads=1",
    "trainer.log_every_tokens=2_000",
    "trainer.evaluate_every_tokens=100_000",
    "trainer.checkpoint_every_tokens=20_000",
]
SHORT = [*TINY, "trainer.budget_tokens=20_000"]
LONG = [*TINY, "trainer.budget_tokens=120_000"]
"""Some 15 seconds of training on one slow core: time to be disturbed in."""
CLUSTER = [
    "infra=slurm_cpu",
    "infra.launch.minutes=20",
    "infra.launch.grace_seconds=60",
]

pytestmark = [
    pytest.mark.timeout(900),
    pytest.mark.skipif(
        not (shutil.which("slurmctld") and os.geteuid() == 0),
        reason="needs Slurm's daemons and root: scripts/setup dev",
    ),
]


@dataclass
class Cluster:
    """A running Slurm."""

    directory: Path
    environment: dict[str, str]

    def run(self, *command: str) -> str:
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
        return done.stdout

    def restart_controller(self) -> None:
        pid_file = self.directory / "slurmctld.pid"
        pid = int(pid_file.read_text())
        os.kill(pid, signal.SIGTERM)
        until(lambda: not Path(f"/proc/{pid}").exists(), "slurmctld ends")
        self.run("slurmctld", "-f", self.environment["SLURM_CONF"])


def until(condition: Callable[[], Any], what: str, seconds: float = 180) -> Any:
    """What `condition` returns, once it is true."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if found := condition():
            return found
        time.sleep(0.1)
    raise AssertionError(f"after {seconds} s not yet: {what}")


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    directory = tmp_path_factory.mktemp("slurm")
    up = subprocess.run([ROOT / "scripts" / "slurm-up", directory], capture_output=True, text=True, timeout=300)
    assert up.returncode == 0, up.stderr
    assert up.stdout == f"export SLURM_CONF={directory}/slurm.conf\n"
    environment = {**os.environ, "SLURM_CONF": f"{directory}/slurm.conf", "OMP_NUM_THREADS": "1"}
    environment.pop("PYTEST_XDIST_WORKER", None)
    pids = [int(path.read_text()) for path in directory.glob("*.pid")]
    assert len(pids) == 5
    try:
        yield Cluster(directory, environment)
    finally:
        pids = [int(path.read_text()) for path in directory.glob("*.pid")]
        subprocess.run([ROOT / "scripts" / "slurm-down", directory], check=True, timeout=120)
        assert not [pid for pid in pids if Path(f"/proc/{pid}/exe").exists()], "a daemon is left"


@dataclass
class Here:
    """A working directory whose runs go to the cluster."""

    directory: Path
    cluster: Cluster

    def command(self, *words: str, code: int = 0) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "llmtrain", *words],
            cwd=self.directory, env=self.cluster.environment, capture_output=True, text=True, timeout=600,
        )  # fmt: skip
        assert done.returncode == code, f"{words}: {done.returncode}\n{done.stdout}{done.stderr}"
        assert "Traceback" not in done.stderr
        return done.stdout + done.stderr

    def submit(self, *words: str) -> str:
        """The sweep's id."""
        said = self.command("train", *words)
        [sweep] = re.findall(r"^sweep (\w+):", said, re.MULTILINE)
        return sweep

    def jobs(self, sweep: str) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = json.loads(self.command("jobs", sweep, "--json"))
        return found

    def reaches(self, sweep: str, tokens: int) -> dict[str, Any]:
        """The first run of the sweep, once it has trained on so many tokens."""
        (place,) = [place for place in all_sweeps(self.directory / "outputs") if place.path.name == sweep]
        run = place.outputs / place.read().points[0].run

        def far() -> bool:
            rows = run / "metrics.jsonl"
            return rows.exists() and any(row["tokens"] >= tokens for row in whole_rows(rows))

        until(far, f"{run} has trained on {tokens} tokens: {self.cluster.run('squeue')}")
        return self.jobs(sweep)[0]

    def ends(self, sweep: str, code: int = 0) -> str:
        return self.command("jobs", "wait", sweep, code=code)


@contextmanager
def drained(cluster: Cluster) -> Iterator[None]:
    """While the node takes no new jobs."""
    node = f"NodeName={socket.gethostname().split('.')[0]}"
    cluster.run("scontrol", "update", node, "State=DRAIN", "Reason=test")
    try:
        yield
    finally:  # refused as an invalid state while a job on it completes
        until(
            lambda: (
                subprocess.run(["scontrol", "update", node, "State=RESUME"], env=cluster.environment).returncode == 0
            ),
            "the node is resumed",
        )


def whole_rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_bytes().split(b"\n")[:-1]]


@pytest.fixture(scope="session")
def beginning(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working directory with prepared data, and two runs that nobody disturbed, on this machine."""
    here = Here(tmp_path_factory.mktemp("undisturbed"), cluster)
    here.command("train", *SHORT)
    here.command("train", *LONG)
    return here.directory


@pytest.fixture(scope="session")
def two_ranks(cluster: Cluster, beginning: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The longer run by two ranks, which nobody disturbed."""
    here = with_its_data(beginning, cluster, tmp_path_factory.mktemp("two-ranks"))
    here.command("train", *LONG, "infra.ranks=2")
    return here.directory


@pytest.fixture
def here(cluster: Cluster, beginning: Path, tmp_path: Path) -> Here:
    """A working directory with prepared data and no runs."""
    return with_its_data(beginning, cluster, tmp_path)


def with_its_data(beginning: Path, cluster: Cluster, directory: Path) -> Here:
    for name in ("data", "tokenizers"):
        shutil.copytree(beginning / "outputs" / name, directory / "outputs" / name)
    return Here(directory, cluster)


def assert_equal_to_undisturbed(beginning: Path, here: Here, run: dict[str, Any]) -> None:
    """Weights, metrics and the tracker's run are those of the run that nobody disturbed; nothing is told twice."""
    other = here.directory / run["directory"]
    left = beginning / "outputs" / "smoke" / other.name
    versions = [ModelVersion.read(directory / "version.json") for directory in (left, other)]
    assert versions[0].model.weights_sha256 == versions[1].model.weights_sha256
    rows = [[without_times(row) for row in read(directory / "metrics.jsonl")] for directory in (left, other)]
    assert rows[0] == rows[1]
    statuses, params, metrics = zip(*(tracked(place)[left.name] for place in (beginning, here.directory)), strict=True)
    assert statuses == ("FINISHED", "FINISHED")
    assert metrics[0] == metrics[1]
    computing = [[(name, value) for name, value in found if not name.startswith("infra.launch.")] for found in params]
    assert computing[0] == computing[1]


def test_a_sweep_is_an_array_and_ends_as_at_home(cluster: Cluster, here: Here, beginning: Path):
    seeds = "trainer.seed=1,2"
    gpu = "infra.launch.gpus_per_rank=1"
    script = here.command("train", "-m", *SHORT, *CLUSTER, seeds, gpu, "--dry-run")
    assert "#SBATCH --gres=gpu:1" in script
    assert "#SBATCH --array=0-1%2" in script
    assert "#SBATCH --signal=USR2@60" in script
    assert not (here.directory / "outputs" / "sweeps").exists()
    with drained(cluster):
        sweep = here.submit("-m", *SHORT, *CLUSTER, seeds, gpu)
        jobs = here.jobs(sweep)
        assert {job["job"].partition("_")[2] for job in jobs} == {"0", "1"}
        assert len({job["job"].partition("_")[0] for job in jobs}) == 1
        [submitted] = list((here.directory / "outputs" / "sweeps" / sweep / "slurm").glob("*_submission.sh"))
        told = [
            line for line in submitted.read_text().splitlines() if line.startswith("#SBATCH") and "put=" not in line
        ]
        assert all(line in script for line in told)
        shown = cluster.run("scontrol", "show", "job", jobs[0]["job"])
        assert "gres:gpu:1" in shown or "gres/gpu:1" in shown
        again = here.command("train", "-m", *SHORT, *CLUSTER, seeds, gpu)
        assert "2 submitted before and not ended" in again
    here.ends(sweep)
    jobs = here.jobs(sweep)
    assert [job["state"] for job in jobs] == ["finished", "finished"]
    assert [job["starts"] for job in jobs] == [1, 1]
    assert {job["node"] for job in jobs} == {socket.gethostname()}
    assert len(list((here.directory / "outputs" / "smoke").iterdir())) == 2
    again = here.command("train", "-m", *SHORT, *CLUSTER, seeds, gpu)
    assert again.count("is finished") == 2
    text = here.command("jobs", sweep)
    assert "trainer.seed" in text
    assert here.command("jobs", "logs", sweep, "1").count("registered smoke@") == 1


def test_a_request_that_no_node_can_serve_is_refused_in_slurms_words(here: Here):
    said = here.command("train", *SHORT, *CLUSTER, "infra.launch.gpus_per_rank=3", code=2)
    assert "Slurm refuses the job: sbatch: error: " in said
    said = here.command("train", *SHORT, *CLUSTER, "infra.launch.partition=nosuch", code=2)
    assert "invalid partition specified: nosuch" in said


@pytest.mark.campaign
def test_two_tasks_of_srun_are_two_ranks(here: Here, beginning: Path):
    sweep = here.submit(*SHORT, *CLUSTER, "infra.ranks=2")
    here.ends(sweep)
    [run] = here.jobs(sweep)
    alone = [row["train/loss"] for row in read(beginning / "outputs" / "smoke" / run["run"] / "metrics.jsonl")]
    rows = read(here.directory / run["directory"] / "metrics.jsonl")
    assert [row["train/loss"] for row in rows] == pytest.approx(alone, rel=1e-5)
    assert "2 ranks, ddp" in (here.directory / run["directory"] / "log.txt").read_text()


def test_a_preempted_run_saves_comes_back_and_ends_equal(cluster: Cluster, here: Here, beginning: Path):
    sweep = here.submit(*LONG, *CLUSTER, f"infra.launch.cpus_per_rank={os.cpu_count()}")
    before = here.reaches(sweep, 40_000)
    cluster.run(
        "sbatch", "--partition=urgent", f"--cpus-per-task={os.cpu_count()}", "--output=/dev/null", "--wrap=sleep 2"
    )
    here.ends(sweep)
    [run] = here.jobs(sweep)
    assert_equal_to_undisturbed(beginning, here, run)
    first, second = starts(here.directory / run["directory"])
    log = (here.directory / run["directory"] / "log.txt").read_text()
    assert "SIGUSR2: stopping after this step" in log
    [saved] = re.findall(r"is saved at step (\d+)", log)
    assert second.step == int(saved) >= before["step"] > first.step == 0


@pytest.mark.campaign
def test_a_run_that_is_requeued_comes_back(cluster: Cluster, here: Here, beginning: Path):
    sweep = here.submit(*LONG, *CLUSTER)
    run = here.reaches(sweep, 40_000)
    cluster.run("scontrol", "requeue", run["job"])
    here.ends(sweep)
    [run] = here.jobs(sweep)
    assert run["starts"] == 2
    assert_equal_to_undisturbed(beginning, here, run)


@pytest.mark.campaign
def test_a_cancelled_run_ends_and_the_same_command_goes_on(cluster: Cluster, here: Here, beginning: Path):
    sweep = here.submit(*LONG, *CLUSTER)
    here.reaches(sweep, 40_000)
    assert here.command("jobs", "cancel", sweep) == "1 told to stop\n"
    said = here.ends(sweep, code=3)
    assert "stopped" in said
    [run] = here.jobs(sweep)
    assert (run["state"], run["starts"]) == ("stopped", 1)
    assert here.submit(*LONG, *CLUSTER) == sweep
    here.ends(sweep)
    [run] = here.jobs(sweep)
    assert run["starts"] == 2
    assert_equal_to_undisturbed(beginning, here, run)


@pytest.mark.campaign
def test_a_killed_run_loses_at_most_a_checkpoint_interval(here: Here, two_ranks: Path):
    sweep = here.submit(*LONG, *CLUSTER, "infra.ranks=2")
    before = here.reaches(sweep, 50_000)
    directory = here.directory / before["directory"]
    [start] = starts(directory)
    os.kill(start.pid, signal.SIGKILL)
    here.ends(sweep)
    _, second = starts(directory)
    steps = [row["step"] for row in read(directory / "metrics.jsonl") if row["tokens"] <= before["tokens"]]
    tokens_per_step = before["tokens"] / steps[-1]
    assert second.step * tokens_per_step > before["tokens"] - 20_000 - 2 * tokens_per_step
    assert_equal_to_undisturbed(two_ranks, here, before)


@pytest.mark.campaign
def test_the_signal_may_come_to_any_rank(here: Here, two_ranks: Path):
    sweep = here.submit(*LONG, *CLUSTER, "infra.ranks=2")
    before = here.reaches(sweep, 40_000)
    directory = here.directory / before["directory"]
    [start] = starts(directory)
    os.kill(other_rank(start.pid), signal.SIGUSR2)
    here.ends(sweep)
    _, second = starts(directory)
    [saved] = set(re.findall(r"is saved at step (\d+)", (directory / "log.txt").read_text()))
    assert second.step == int(saved) >= before["step"]
    assert_equal_to_undisturbed(two_ranks, here, before)


def other_rank(pid: int) -> int:
    """The other process of the job step that `pid` is a task of."""
    parent = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1]
    [other] = set(map(int, Path(f"/proc/{parent}/task/{parent}/children").read_text().split())) - {pid}
    return other


@pytest.mark.campaign
def test_a_run_that_hits_its_time_limit_goes_on_after_it(here: Here, beginning: Path):
    """Slurm signals up to a minute early: with a limit of one minute, soon after the start."""
    sweep = here.submit(*LONG, *CLUSTER, "infra.launch.minutes=1", "infra.launch.grace_seconds=30")
    here.ends(sweep)
    [run] = here.jobs(sweep)
    assert run["starts"] >= 2
    assert "SIGUSR2: stopping" in (here.directory / run["directory"] / "log.txt").read_text()
    assert_equal_to_undisturbed(beginning, here, run)


@pytest.mark.campaign
def test_a_drained_node_and_a_restarted_controller_lose_nothing(cluster: Cluster, here: Here, beginning: Path):
    sweep = here.submit(*LONG, *CLUSTER)
    here.reaches(sweep, 20_000)
    with drained(cluster):
        waiting = here.submit(*SHORT, *CLUSTER)
        cluster.restart_controller()
        here.ends(sweep)
        assert [run["state"] for run in here.jobs(waiting)] == ["waiting"]
    here.ends(waiting)
    [run] = here.jobs(sweep)
    assert run["starts"] == 1
    assert_equal_to_undisturbed(beginning, here, run)
    assert_equal_to_undisturbed(beginning, here, here.jobs(waiting)[0])


HOLD_LOCK = "import fcntl, sys, time; f = open(sys.argv[1], 'w'); fcntl.flock(f, fcntl.LOCK_EX); time.sleep(600)"


@pytest.mark.campaign
def test_a_run_that_never_gets_on_is_given_up(here: Here):
    sweep = here.submit(*SHORT, *CLUSTER, "infra.launch.restarts=1")
    directory = here.directory / here.jobs(sweep)[0]["directory"]
    lock = subprocess.Popen([sys.executable, "-c", HOLD_LOCK, str(directory / "lock")])
    try:
        said = here.ends(sweep, code=3)
    finally:
        lock.kill()
        lock.wait()
    assert "failed: failed" in said
    assert len(starts(directory)) == 2
    log = (directory / "log.txt").read_text()
    assert "another process works on this run" in log
    assert "2 starts in a row have not got beyond step 0, and infra.launch.restarts=1: given up" in log


@pytest.mark.campaign
def test_a_search_whose_controller_is_killed_submits_each_point_once(cluster: Cluster, here: Here):
    limits = ["sweep.trials=3", "sweep.concurrent=2", "trainer.lr=tag(log,interval(1e-4,1e-2))"]
    sweep = here.submit("-m", *SHORT, *CLUSTER, "sweep=tpe", *limits)
    [place] = all_sweeps(here.directory / "outputs")
    search = SearchDirectory(place)
    until(lambda: len(place.handles()) == 2, f"two points are submitted: {search.path / 'controller.log'}")
    state = search.state()
    assert state is not None
    assert state.process is not None
    os.kill(state.process[0], signal.SIGKILL)
    assert "its controller has gone: llmtrain jobs resume" in here.command("jobs", sweep)
    here.command("jobs", "resume", sweep)
    here.ends(sweep)
    points = place.begun().values()
    assert [point.verdict for point in points] == ["done"] * 3
    assert [len(starts(place.outputs / run)) for point in points for run in point.runs] == [1, 1, 1]
    jobs = cluster.run("sacct", "--allocations", "--noheader", "--format=JobName%64,State").splitlines()
    assert [line.split()[1] for line in jobs if sweep in line] == ["COMPLETED"] * 3


@pytest.mark.campaign
def test_the_commands_of_the_readme(here: Here):
    block = re.search(r"^## Launch\n.*?```\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL | re.MULTILINE)
    assert block is not None
    small = f"{' '.join(SHORT[1:])} tracking=none"
    sweep = ""
    for line in block[1].splitlines():
        command = re.sub(r"\s+#.*", "", line).replace("$SWEEP", sweep).split()
        if command[:2] == ["python", "train.py"]:
            said = here.command("train", *command[2:], *small.split())
            sweep = "".join(re.findall(r"^sweep (\w+):", said, re.MULTILINE)) or sweep
        else:
            assert command[0] == "llmtrain"
            said = here.command(*command[1:])
    assert "2 of 2 have ended" in said
