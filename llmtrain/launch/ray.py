"""Ray, through its Jobs API: a submission is one Ray job, whose driver (ray_driver.py) runs the frozen runs as tasks.

The head is asked over HTTP only; this process never joins the cluster. What the driver knows stands in its status file,
so that runs that have ended are known when the cluster is gone.
"""

import json
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmtrain.config.infra import Infra
from llmtrain.config.launch import RayLaunch
from llmtrain.errors import UserError
from llmtrain.files import write_whole
from llmtrain.launch.engine import Job, Run, State
from llmtrain.launch.entries import cancelled, parsed, status_of
from llmtrain.launch.starts import starts
from llmtrain.processes import importable

if TYPE_CHECKING:
    from ray.job_submission import JobDetails, JobSubmissionClient


class RayEngine:
    """Handles are `STATUS_FILE#NUMBER`; the file is named as the submission is in Ray."""

    def __init__(self, launch: RayLaunch) -> None:
        self.launch = launch

    def submit(self, sweep: Path, runs: Sequence[Run]) -> Iterator[tuple[Run, str]]:
        """As `Engine.submit`.

        Raises UserError where there is no Ray, here or at the address; where the two are different, the token is
        missing, or no node has what a rank asks for.
        """
        if not runs:
            return
        client = self._client()
        self._check_room(runs[0].infra)
        file = _next_file(sweep, client)
        file.parent.mkdir(parents=True, exist_ok=True)
        write_whole(file, json.dumps(self._status(runs), indent=2) + "\n")
        try:
            client.submit_job(**_request(file))
        except RuntimeError as error:
            file.unlink()
            raise UserError(f"Ray at {self.launch.address} refuses the job: {error}") from error
        yield from ((run, f"{file}#{number}") for number, run in enumerate(runs))

    def script(self, sweep: Path, runs: Sequence[Run]) -> str:
        """What is posted to the head, and the status file that the job's driver begins with."""
        file = _next_file(sweep)
        shown = {"POST": f"{self.launch.address}/api/jobs/", "job": _request(file), "file": self._status(runs)}
        return json.dumps(shown, indent=2)

    def jobs(self, handles: Sequence[str]) -> dict[str, Job]:
        """By the drivers' files, and what the head says of the drivers. Raises UserError where Ray is missing here."""
        files = {file: status_of(file) for file in {parsed(handle)[0] for handle in handles}}
        open_ones = [file for file, status in files.items() if status and any("code" not in e for e in status["runs"])]
        drivers = self._drivers(open_ones) if open_ones else {}
        return {handle: _job(handle, files, drivers) for handle in handles}

    def cancel(self, handles: Sequence[str]) -> None:
        """Leave word for the driver, and for the process that watches the run: it is sent SIGTERM, and saves."""
        for handle in handles:
            cancelled(*parsed(handle)).touch()

    def find(self, sweep: Path, runs: Sequence[Run]) -> dict[Path, str]:
        """The handles of those `runs`, by their directories, that a living driver of the sweep works on."""
        client, wanted = self._client(), {str(run.directory.resolve()): run.directory for run in runs}
        found: dict[Path, str] = {}
        for file in sorted(sweep.resolve().glob("llmtrain-*.json")):
            open_ones = [
                (wanted[entry["directory"]], number)
                for number, entry in enumerate((status_of(file) or {"runs": []})["runs"])
                if entry["directory"] in wanted and "code" not in entry and not cancelled(file, number).exists()
            ]
            details = _details(client, file.stem) if open_ones else None
            if details is not None and not details.status.is_terminal():
                found |= {directory: f"{file}#{number}" for directory, number in open_ones}
        return found

    def _status(self, runs: Sequence[Run]) -> dict[str, Any]:
        return {
            "parallel": self.launch.parallel,
            "restarts": self.launch.restarts,
            "ranks": runs[0].infra.ranks,
            "cpus_per_rank": self.launch.cpus_per_rank,
            "gpus_per_rank": self.launch.gpus_per_rank,
            "runs": [{"directory": str(run.directory.resolve()), "state": "waiting"} for run in runs],
        }

    def _client(self) -> "JobSubmissionClient":
        try:
            import ray
            from ray.exceptions import AuthenticationError
            from ray.job_submission import JobSubmissionClient
        except ImportError as error:
            raise UserError("Ray is not installed here: pip install 'llmtrain[ray]'") from error
        address = self.launch.address
        try:
            with _only_ours():
                client = JobSubmissionClient(address)
        except ConnectionError as error:
            raise UserError(
                f"no Ray head answers at {address}: start one (`ray start --head --dashboard-host=127.0.0.1`, see "
                f"launchers/ray/README.md), or name its dashboard: infra.launch.address=http://HOST:8265"
            ) from error
        except AuthenticationError as error:
            raise UserError(
                f"Ray at {address} wants its token: set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN_PATH to the file that "
                f"the head was started with ({str(error).splitlines()[0]})"
            ) from error
        except (RuntimeError, OSError, ValueError) as error:
            raise UserError(f"what answers at {address} is no Ray head: {str(error).splitlines()[0]}") from error
        there = client._server_ray_version
        if there is None or there.split(".")[:2] != ray.__version__.split(".")[:2]:
            raise UserError(
                f"the head at {address} is Ray {there}, here is {ray.__version__}: pip install 'ray[default]=={there}'"
            )
        return client

    def _check_room(self, infra: Infra) -> None:
        """Raises UserError where the run would wait for ever, because the nodes are too small or too few."""
        from ray.util.state import list_nodes

        with _only_ours():
            found = list_nodes(address=self.launch.address)
        nodes = [node.resources_total or {} for node in found if node.state == "ALIVE"]
        cpus, gpus = self.launch.cpus_per_rank, self.launch.gpus_per_rank
        if (room := room_for_ranks(nodes, cpus, gpus)) < infra.ranks:
            listed = ", ".join(f"{node.get('CPU', 0):g} CPUs {node.get('GPU', 0):g} GPUs" for node in nodes)
            raise UserError(
                f"a run of {infra.ranks} ranks, {cpus:g} CPUs and {gpus:g} GPUs each, would wait for ever: the nodes "
                f"at {self.launch.address} hold {room} such ranks ({listed}); lower infra.ranks, "
                f"infra.launch.cpus_per_rank or infra.launch.gpus_per_rank, or add nodes first"
            )

    def _drivers(self, files: Sequence[Path]) -> dict[Path, "JobDetails | None"]:
        """What the head knows of each file's job; nothing where it does not answer."""
        try:
            client = self._client()
        except UserError as error:
            if isinstance(error.__cause__, ImportError):
                raise
            return {}
        return {file: _details(client, file.stem) for file in files}


def room_for_ranks(nodes: Sequence[dict[str, float]], cpus: float, gpus: float) -> int:
    """How many ranks the nodes hold when they are empty; a node's resources are by Ray's names."""

    def holds(node: dict[str, float], name: str, asked: float) -> float:
        return math.floor(node.get(name, 0) / asked + 1e-6) if asked else math.inf

    return int(sum(min(holds(node, "CPU", cpus), holds(node, "GPU", gpus)) for node in nodes))


def _request(file: Path) -> dict[str, Any]:
    """What `submit_job` is given. The driver takes no CPU of its own, and runs on the head."""
    with importable():
        variables = {"PYTHONPATH": os.environ["PYTHONPATH"]}
    return {
        "submission_id": file.stem,
        "entrypoint": f"python -m llmtrain.launch.ray_driver '{file}'",
        "runtime_env": {"env_vars": variables},
    }


def _next_file(sweep: Path, client: "JobSubmissionClient | None" = None) -> Path:
    """The status file of the next submission; its name is free in the sweep, and with Ray where `client` can ask."""
    taken = [int(file.stem.rpartition("-")[2]) for file in sweep.glob(f"llmtrain-{sweep.name}-*.json")]
    number = max(taken, default=0) + 1
    while client and _details(client, f"llmtrain-{sweep.name}-{number}") is not None:
        number += 1
    return sweep.resolve() / f"llmtrain-{sweep.name}-{number}.json"


def _details(client: "JobSubmissionClient", submission: str) -> "JobDetails | None":
    try:
        return client.get_job_info(submission)
    except RuntimeError:  # 404
        return None


def _job(handle: str, files: "dict[Path, Any]", drivers: "dict[Path, JobDetails | None]") -> Job:
    file, number = parsed(handle)
    status = files[file]
    if status is None:
        return Job(State.UNKNOWN)
    entry = status["runs"][number]
    begun = starts(Path(entry["directory"]))
    node = begun[-1].node if begun else ""
    if "code" in entry:
        return Job(State.ENDED, node, "cancelled" if entry["cancelled"] else entry["reason"], entry["code"])
    driver = drivers.get(file)
    if driver is None:
        return Job(State.UNKNOWN, node, "no Ray head answers for it")
    if driver.status.is_terminal():
        how = "cancelled with all of its job" if driver.status.value == "STOPPED" else "its driver has ended"
        last = (driver.message or "").strip().splitlines()[-1:]
        return Job(State.ENDED, node, " ".join([f"{how} (ray job logs {file.stem}):", *last]))
    if entry["state"] == "waiting" or len(begun) <= entry["starts"]:
        return Job(State.WAITING, "", "" if entry["state"] == "waiting" else "for resources")
    return Job(State.STOPPING if cancelled(file, number).exists() else State.RUNNING, node)


@contextmanager
def _only_ours() -> Iterator[None]:
    """Without the variables that Ray would follow instead of the address that it is given."""
    names = ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS")
    aside = {name: os.environ.pop(name) for name in names if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(aside)
