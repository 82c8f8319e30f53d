"""Ray without a cluster: what would be posted, what is said where there is no head, and how the driver decides."""

import fcntl
import json
import os
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from llmtrain.config.compose import load_config
from llmtrain.config.frozen import FrozenRun
from llmtrain.config.launch import RayLaunch
from llmtrain.errors import ConfigError, UserError
from llmtrain.launch import ray_driver, ray_rank, starts
from llmtrain.launch.engine import Run, State
from llmtrain.launch.entries import cancelled
from llmtrain.launch.ray import RayEngine, room_for_ranks

ray = pytest.importorskip("ray", reason="needs Ray: pip install 'llmtrain[ray]'")


def run_of(directory: Path, *overrides: str) -> Run:
    config = load_config(["model=qwen3_tiny", "infra=ray_cpu", *overrides])
    return Run(directory, FrozenRun.model_construct(config=config))


def engine_at(address: str) -> RayEngine:
    launch = run_of(Path("x"), f"infra.launch.address={address}").infra.launch
    assert isinstance(launch, RayLaunch)
    return RayEngine(launch)


@contextmanager
def answering(answers: dict[str, tuple[int, Any]]) -> Iterator[str]:
    """The address of a server that answers each path with a code and JSON, and others with 404."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            code, body = answers.get(self.path.partition("?")[0], (404, "not found"))
            self.send_response(code)
            self.end_headers()
            self.wfile.write(json.dumps(body).encode())

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()
            thread.join()


# ---- what is submitted


def test_the_script_is_the_job_and_what_its_driver_begins_with_and_nothing_is_written(tmp_path: Path):
    run = run_of(tmp_path / "outputs" / "a", "infra.launch.cpus_per_rank=0.5", "infra.launch.parallel=3")
    assert isinstance(run.infra.launch, RayLaunch)
    sweep = tmp_path / "outputs" / "sweeps" / "ab12cd34"
    shown = json.loads(RayEngine(run.infra.launch).script(sweep, [run]))
    assert shown["POST"] == "http://127.0.0.1:8265/api/jobs/"
    assert shown["job"]["submission_id"] == "llmtrain-ab12cd34-1"
    assert shown["job"]["entrypoint"] == f"python -m llmtrain.launch.ray_driver '{sweep}/llmtrain-ab12cd34-1.json'"
    assert shown["job"]["runtime_env"]["env_vars"].keys() == {"PYTHONPATH"}, "no secrets: the dashboard shows them"
    assert shown["file"]["runs"] == [{"directory": str(tmp_path / "outputs" / "a"), "state": "waiting"}]
    assert (shown["file"]["cpus_per_rank"], shown["file"]["ranks"], shown["file"]["parallel"]) == (0.5, 1, 3)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("nodes", "cpus", "gpus", "room"),
    [
        ([{"CPU": 2.0}, {"CPU": 2.0}], 0.5, 0, 8),
        ([{"CPU": 2.0}, {"CPU": 3.0}], 2, 0, 2),
        ([{"CPU": 64.0, "GPU": 8.0}, {"CPU": 64.0}], 8, 1, 8),
        ([{"CPU": 64.0, "GPU": 8.0}], 1, 0.1, 64),
        ([{"CPU": 0.3}], 0.1, 0, 3),
        ([{"memory": 1e9}], 1, 0, 0),
    ],
)
def test_room_for_ranks(nodes: list[dict[str, float]], cpus: float, gpus: float, room: int):
    assert room_for_ranks(nodes, cpus, gpus) == room


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["infra.launch.cpus_per_rank=1.5"], "cpus_per_rank=1.5: Ray shares out parts of one only; set it to 2"),
        (["infra.launch.gpus_per_rank=0.5", "infra.ranks=2"], "set infra.launch.gpus_per_rank=1"),
    ],
)
def test_shares_that_ray_cannot_give_are_refused_with_the_config(overrides: list[str], said: str):
    with pytest.raises(ConfigError, match=said):
        load_config(["model=qwen3_tiny", "infra=ray_cpu", *overrides])


def test_the_cluster_file_is_one_by_rays_own_schema():
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = yaml.safe_load((Path(__file__).parents[3] / "launchers" / "ray" / "cluster.yaml").read_text())
    validate_config(prepare_config(config))
    with pytest.raises(jsonschema.ValidationError, match="min_worker"):
        validate_config({**prepare_config(config), "min_worker": 2})


# ---- where something is missing


def test_no_head(tmp_path: Path):
    with pytest.raises(UserError, match=r"no Ray head answers at http://127.0.0.1:9: start one"):
        list(engine_at("http://127.0.0.1:9").submit(tmp_path, [run_of(tmp_path)]))


def test_another_server(tmp_path: Path):
    with answering({}) as address, pytest.raises(UserError, match=f"what answers at {address} is no Ray head"):
        list(engine_at(address).submit(tmp_path, [run_of(tmp_path)]))


def test_another_version_of_ray(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("RAY_ADDRESS", "http://127.0.0.1:9")  # the config's address counts
    said = pytest.raises(
        UserError, match=r"the head at .* is Ray 2.9.0, here is .*: pip install 'ray\[default\]==2.9.0'"
    )
    with answering({"/api/version": (200, {"ray_version": "2.9.0"})}) as address, said:
        list(engine_at(address).submit(tmp_path, [run_of(tmp_path)]))
    assert os.environ["RAY_ADDRESS"] == "http://127.0.0.1:9"


def test_a_head_that_wants_a_token(tmp_path: Path):
    said = pytest.raises(UserError, match="wants its token: set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN_PATH")
    with answering({"/api/version": (401, "Unauthorized: Missing authentication token")}) as address, said:
        list(engine_at(address).submit(tmp_path, [run_of(tmp_path)]))


# ---- how jobs stand


def test_what_has_ended_is_known_when_the_cluster_is_gone(tmp_path: Path):
    entries = [
        {"directory": str(tmp_path / "a"), "state": "ended", "code": 3, "cancelled": False, "reason": "exit code 3"},
        {"directory": str(tmp_path / "b"), "state": "ended", "code": 75, "cancelled": True, "reason": "exit code 75"},
        {"directory": str(tmp_path / "c"), "state": "given", "starts": 0},
    ]
    file = tmp_path / "llmtrain-ab12cd34-1.json"
    file.write_text(json.dumps({"runs": entries}))
    handles = [*(f"{file}#{number}" for number in range(3)), f"{tmp_path}/other.json#0"]
    failed, stopped, lost, forgotten = engine_at("http://127.0.0.1:9").jobs(handles).values()
    assert (failed.state, failed.reason) == (State.ENDED, "exit code 3")
    assert (stopped.state, stopped.reason) == (State.ENDED, "cancelled")
    assert lost.state == forgotten.state == State.UNKNOWN


# ---- the driver


class Nodes:
    """A cluster of threads: each run ends as it is told to, and notes its start unless it cannot begin."""

    def __init__(self, endings: dict[str, list[int | Exception]], begins: bool = True) -> None:
        self.endings, self.begins = endings, begins
        self.begun: list[str] = []
        self.now = self.most = 0

    def start(self, directory: str, job: str, cancel: str) -> Future[int]:
        name, future = Path(directory).name, Future[int]()
        self.begun.append(name)
        self.now += 1
        self.most = max(self.most, self.now)
        if self.begins:
            starts.note(Path(directory), "ray", job)

        def end() -> None:
            ending = self.endings[name].pop(0)
            self.now -= 1
            if isinstance(ending, Exception):
                future.set_exception(ending)
            else:
                future.set_result(ending)

        threading.Timer(0.05, end).start()
        return future


def submission(place: Path, names: str, restarts: int = 3) -> tuple[Path, dict[str, Any]]:
    for name in names:
        (place / name).mkdir()
    runs = [{"directory": str(place / name), "state": "waiting"} for name in names]
    return place / "llmtrain-ab12cd34-1.json", {"restarts": restarts, "runs": runs}


def test_runs_wait_for_their_turn_and_only_what_asks_for_it_is_started_again(tmp_path: Path):
    lost = ray.exceptions.WorkerCrashedError()
    nodes = Nodes({"a": [0], "b": [75, lost, 0], "c": [2], "d": [ValueError("a bug")]})
    file, status = submission(tmp_path, "abcd")
    assert ray_driver.drive(file, status, nodes.start, at_once=2) == 3
    assert nodes.most == 2
    assert sorted(nodes.begun) == ["a", "b", "b", "b", "c", "d"]
    kept = json.loads(file.read_text())["runs"]
    assert [(entry["state"], entry["code"]) for entry in kept] == [("ended", code) for code in (0, 0, 2, 3)]
    assert kept[3]["reason"] == "ValueError: a bug"


def test_starts_in_vain_are_given_up_also_where_no_process_begins(tmp_path: Path):
    for number, begins in enumerate((True, False)):
        nodes = Nodes({"a": [75] * 9}, begins)
        (place := tmp_path / str(number)).mkdir()
        file, status = submission(place, "a", restarts=2)
        assert ray_driver.drive(file, status, nodes.start, at_once=None) == 75
        assert len(nodes.begun) == 3


def test_a_run_that_is_not_wanted_any_more_does_not_begin_and_does_not_come_back(tmp_path: Path):
    file, status = submission(tmp_path, "ab")
    cancelled(file, 1).touch()

    class Cancelling(Nodes):
        def start(self, directory: str, job: str, cancel: str) -> Future[int]:
            Path(cancel).touch()
            return super().start(directory, job, cancel)

    nodes = Cancelling({"a": [75, 0]})
    assert ray_driver.drive(file, status, nodes.start, at_once=None) == 0
    assert nodes.begun == ["a"]
    kept = json.loads(file.read_text())["runs"]
    assert [(entry["state"], entry["cancelled"]) for entry in kept] == [("ended", True)] * 2


# ---- the process of a rank


def test_a_rank_waits_until_the_process_of_the_last_start_has_saved(tmp_path: Path):
    with (tmp_path / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        threading.Timer(0.7, lambda: fcntl.flock(file, fcntl.LOCK_UN)).start()
        begun = time.monotonic()
        ray_rank._wait_for_the_last_start(tmp_path)
        assert time.monotonic() - begun > 0.6
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # it has let go


def test_the_exit_code_of_a_rank_is_the_tasks_and_a_missing_run_is_told_in_its_log(tmp_path: Path):
    directory = tmp_path / "run"
    directory.mkdir()
    assert ray_rank.alone(str(directory), "llmtrain-x-1/0", str(tmp_path / "cancel")) == 2
    assert "config.json" in (directory / starts.LOG).read_text()
    [start] = starts.starts(directory)
    assert (start.engine, start.job) == ("ray", "llmtrain-x-1/0")
