"""Runs and sweeps on a real Ray cluster: a head without CPUs and two worker nodes, started by `ray start` as
launchers/ray/README.md says, with token authentication. The processes that submit share no memory with it.
"""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib as mpl
import pytest
import torch

from llmtrain.artifacts import ModelVersion
from llmtrain.cli.jobs import main as jobs
from llmtrain.cli.train import main as train
from llmtrain.launch.starts import LOG, Start, starts
from llmtrain.launch.status import Status, statuses
from llmtrain.launch.sweeps import all_sweeps
from llmtrain.telemetry.metrics import read, without_times
from tests.faults.runs import text

_raylet = pytest.importorskip("ray._raylet", reason="needs Ray: pip install 'llmtrain[ray]'")

ROOT = Path(__file__).parents[2]
TINY = (
    "experiment=smoke",
    "infra.precision=fp32",
    "infra.threads=1",
    "tracking=none",
    "data=text_files",
    "data.corpus.paths=[text/*.txt]",
    "data.corpus.licence=PSF-2.0",
    "trainer.sample_tokens=2",
    "trainer.log_every_tokens=2_000",
    "trainer.evaluate_every_tokens=50_000",
    "trainer.checkpoint_every_tokens=10_000",
)
GRID = (*TINY, "trainer.budget_tokens=10_000", "trainer.lr=1e-3,3e-3", "trainer.seed=1,2")
LONG = (*TINY, "trainer.budget_tokens=80_000")
"""Some seconds of training: time to be disturbed in."""
NODES = 2
CPUS = 2.0

pytestmark = [pytest.mark.timeout(900), pytest.mark.campaign]


def until(condition: Callable[[], Any], what: str, seconds: float = 400) -> Any:
    """What `condition` returns, once it is true."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if found := condition():
            return found
        time.sleep(0.1)
    raise AssertionError(f"after {seconds} s not yet: {what}")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def processes_of(place: Path) -> dict[int, str]:
    """The command lines, by pid, of all that was started with `HOME` in `place`."""
    found = {}
    for directory in Path("/proc").iterdir():
        try:
            if directory.name.isdigit() and f"HOME={place}/home".encode() in (directory / "environ").read_bytes():
                found[int(directory.name)] = (directory / "cmdline").read_text().replace("\0", " ")
        except OSError:  # it has ended
            continue
    return found


@dataclass
class Cluster:
    """A head and worker nodes on loopback, each a `ray start --block`; all they write is in `place`."""

    place: Path
    dashboard: int = field(default_factory=free_port)
    nodes: list[subprocess.Popen[bytes]] = field(default_factory=list)

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.dashboard}"

    @property
    def environment(self) -> dict[str, str]:
        ours = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "PYTEST_"))}
        return ours | {
            "HOME": str(self.place / "home"),
            "MPLCONFIGDIR": mpl.get_cachedir(),  # fonts are looked for once
            "OMP_NUM_THREADS": "1",
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            "PYTHONUNBUFFERED": "1",
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(self.place / "token"),
            "RAY_TMPDIR": str(self.place),
            "RAY_USAGE_STATS_ENABLED": "0",
        }

    def up(self) -> None:
        (self.place / "home").mkdir()
        (self.place / "token").write_text("c0ffee" * 10)
        self._start(
            "--head", f"--port={free_port()}", "--dashboard-host=127.0.0.1", f"--dashboard-port={self.dashboard}",
            f"--ray-client-server-port={free_port()}", "--num-cpus=0",
        )  # fmt: skip
        [gcs] = re.findall(r"--address='(\S+)'", self.logs())
        for _ in range(NODES):
            self._start(f"--address={gcs}", f"--num-cpus={CPUS:g}")
        until(lambda: self.living_nodes() == 1 + NODES, "all nodes have joined")

    def _start(self, *options: str) -> None:
        """One after the other: nodes of a machine that start together take the same sockets."""
        log = self.place / f"node-{len(self.nodes)}.log"
        ports = ("--min-worker-port=0", "--max-worker-port=0", f"--dashboard-agent-listen-port={free_port()}")
        command = ["ray", "start", "--block", "--node-ip-address=127.0.0.1", "--object-store-memory=100000000"]
        with log.open("wb") as file:
            self.nodes.append(
                subprocess.Popen(
                    [*command, *ports, *options], env=self.environment, cwd=self.place, stdout=file, stderr=file
                )
            )
        until(lambda: "runtime started" in log.read_text() or self.nodes[-1].poll() is not None, f"{log} says it is up")
        assert self.nodes[-1].poll() is None, log.read_text()

    def living_nodes(self) -> int:
        from ray.util.state import list_nodes

        return len([node for node in list_nodes(address=self.address) if node.state == "ALIVE"])

    def logs(self) -> str:
        return "\n".join(path.read_text() for path in sorted(self.place.glob("node-*.log")))

    def kill_node_of(self, pid: int) -> None:
        """SIGKILL for the raylet above a process."""
        while "raylet/raylet" not in Path(f"/proc/{pid}/cmdline").read_text():
            pid = parent_of(pid)
            assert pid > 1
        os.kill(pid, signal.SIGKILL)

    def down(self) -> None:
        for node in reversed(self.nodes):
            node.terminate()
        for node in self.nodes:
            node.wait(60)


def parent_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


@dataclass
class Here:
    """A working directory whose runs go to the cluster, and the same runs made without it."""

    directory: Path
    cluster: Cluster

    def submit(self, *words: str) -> list[Status]:
        before = {place.path for place in all_sweeps(Path("outputs"))}
        assert train([*words, "infra=ray_cpu", f"infra.launch.address={self.cluster.address}"]) == 0
        [place] = [place for place in all_sweeps(Path("outputs")) if place.path not in before]
        self.place = place
        return statuses(place)

    def now(self) -> list[Status]:
        return statuses(self.place)

    def begins(self, number: int, tokens: int) -> Start:
        """The start of a run of the sweep, once it has trained on so many tokens."""
        run = until(
            lambda: next((one for one in [self.now()[number]] if one.tokens >= tokens), None), f"run {number} trains"
        )
        assert run.state == "running"
        assert run.node == socket.gethostname()
        return starts(run.directory)[-1]

    def ends(self) -> list[Status]:
        assert jobs(["wait", self.place.path.name]) in (0, 3)
        return self.now()


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Here]:
    directory = tmp_path_factory.mktemp("ray")
    place = Path(tempfile.mkdtemp(prefix="ray-"))  # sockets have short names
    cluster, threads = Cluster(place), torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(directory)
        for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN_PATH"):
            patch.setenv(name, cluster.environment[name])
        try:
            _raylet.Config.initialize("")  # what it found when it was imported
            cluster.up()
            text(directory)
            for words in (["-m", *GRID, "name=alone"], [*LONG, "name=alone"], [*LONG, "infra.ranks=2", "name=pair"]):
                assert train(words) == 0
            yield Here(directory, cluster)
        finally:
            cluster.down()
            for pid in processes_of(place):  # where a test has failed
                os.kill(pid, signal.SIGKILL)
            shutil.rmtree(place)
            torch.set_num_threads(threads)
            torch.use_deterministic_algorithms(False)


def weights(run: Path) -> str:
    return ModelVersion.read(run / "version.json").model.weights_sha256


def rows(run: Path) -> list[dict[str, Any]]:
    return [without_times(row) for row in read(run / "metrics.jsonl")]


def alone(run: Path) -> Path:
    """The same run, made without Ray."""
    return Path("outputs") / "alone" / run.name


def log(run: Path) -> str:
    return (run / LOG).read_text()


def test_a_sweep_shares_the_cores_and_its_runs_are_the_local_ones(here: Here):
    submitted = here.submit("-m", *GRID, "infra.launch.cpus_per_rank=0.5")
    assert len(submitted) == 4
    ended = here.ends()
    for status in ended:
        assert status.state == "finished", log(status.directory)
        assert weights(status.directory) == weights(alone(status.directory))
        assert rows(status.directory) == rows(alone(status.directory))
        assert status.starts == 1
    assert len({status.handle.rpartition("#")[0] for status in ended}) == 1, "one Ray job"


def test_the_same_command_again_submits_nothing(here: Here, capsys: pytest.CaptureFixture[str]):
    assert train(["-m", *GRID, "infra=ray_cpu", f"infra.launch.address={here.cluster.address}"]) == 0
    assert capsys.readouterr().out.count("is finished") == 4
    assert len(list(here.place.path.glob("llmtrain-*.json"))) == 1


def test_two_workers_give_the_losses_of_one_although_one_of_them_is_killed(here: Here):
    here.submit(*LONG, "infra.ranks=2", "name=ranks")
    start = here.begins(0, tokens=12_000)
    worker = parent_of(start.pid)
    assert "RayTrainWorker" in Path(f"/proc/{worker}/cmdline").read_text()
    os.kill(worker, signal.SIGKILL)
    [killed] = here.ends()
    assert killed.state == "finished", log(killed.directory)
    assert killed.starts == 2
    assert starts(killed.directory)[1].step > 0, "it began anew"
    pair = Path("outputs") / "pair" / killed.directory.name
    assert weights(killed.directory) == weights(pair)
    assert rows(killed.directory) == rows(pair)
    ours, theirs = rows(pair), rows(alone(pair))
    assert [row["step"] for row in ours] == [row["step"] for row in theirs]
    for one, other in zip(ours[:5], theirs[:5], strict=True):  # what is rounded otherwise grows from step to step
        for name in ("train/loss", "train/grad_norm"):
            assert one.get(name) == pytest.approx(other.get(name), rel=1e-5)


def test_one_run_is_cancelled_and_another_one_outlives_its_node(here: Here):
    here.submit("-m", *LONG, "name=moved,cancelled")
    here.begins(1, tokens=12_000)
    assert jobs(["cancel", here.place.path.name, "2"]) == 0
    start = here.begins(0, tokens=12_000)
    here.cluster.kill_node_of(start.pid)
    moved, stopped = here.ends()
    assert moved.state == "finished", log(moved.directory)
    assert moved.starts == 2
    assert starts(moved.directory)[1].step > 0, "it began anew"
    assert weights(moved.directory) == weights(alone(moved.directory))
    assert rows(moved.directory) == rows(alone(moved.directory))
    assert (stopped.state, stopped.job.reason) == ("stopped", "cancelled")
    assert "is saved at step" in log(stopped.directory)
    assert stopped.starts == 1


def test_what_no_node_has_is_refused(here: Here, capsys: pytest.CaptureFixture[str]):
    words = [*LONG, "name=large", "infra=ray_cpu", f"infra.launch.address={here.cluster.address}"]
    assert train([*words, "infra.launch.cpus_per_rank=64"]) == 2
    said = capsys.readouterr().err
    assert "a run of 1 ranks, 64 CPUs and 0 GPUs each, would wait for ever" in said


def test_without_the_token_nothing_is_submitted(here: Here):
    environment = here.cluster.environment | {"RAY_AUTH_MODE": "disabled"}
    words = [*LONG, "name=stranger", "infra=ray_cpu", f"infra.launch.address={here.cluster.address}"]
    done = subprocess.run(
        [sys.executable, "-m", "llmtrain", "train", *words],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 2
    assert "wants its token: set RAY_AUTH_MODE=token" in done.stderr


def test_nothing_is_left_behind(here: Here):
    """The last test of this file."""
    here.cluster.down()
    until(lambda: not processes_of(here.cluster.place), f"all has ended: {processes_of(here.cluster.place)}", 20)
    assert not (here.cluster.place / "home" / ".ray").exists()
    assert {path.name for path in here.directory.iterdir()} == {"outputs", "text"}
    assert not [path for path in (here.directory / "outputs").rglob("*") if path.name.endswith(".writing")]
    kinds = {path.suffix.rstrip("0123456789") for path in (here.directory / "outputs" / "sweeps").glob("*/*")}
    assert kinds == {".json", ".jsonl", "", ".cancel-"}
