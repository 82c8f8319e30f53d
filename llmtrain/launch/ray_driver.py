"""`python -m llmtrain.launch.ray_driver STATUS_FILE`: the driver of a Ray job, which runs a submission's frozen runs.

A run of one rank is a Ray task, a run of many a Ray Train trainer. Whether a run that has ended is started again is
decided here, by its exit code: Ray's own retries do not know a mistake from a lost node.
"""

import json
import sys
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from llmtrain.errors import RunFailed, TryAgain
from llmtrain.files import write_whole
from llmtrain.launch import ray_rank, work
from llmtrain.launch.entries import cancelled, parsed
from llmtrain.launch.ray import room_for_ranks
from llmtrain.launch.starts import starts

POLL_S = 0.5

Start = Callable[[str, str, str], Future[int]]
"""From a run's directory, the name of its job and the file that asks for its end, to its exit code in the future."""


def drive(file: Path, status: dict[str, Any], start: Start, at_once: int | None) -> int:
    """Run what is in the status file to its end, `at_once` at the same time; returns the largest exit code."""
    runs: list[dict[str, Any]] = status["runs"]
    waiting, working = list(range(len(runs))), dict[Future[int], int]()
    while waiting or working:
        unwanted = {parsed(path.name.replace(".cancel-", "#"))[1] for path in file.parent.glob(f"{file.stem}.cancel-*")}
        changed = False
        for number in unwanted.intersection(waiting):
            waiting.remove(number)
            runs[number] |= {"state": "ended", "code": TryAgain.exit_code, "cancelled": True, "reason": "cancelled"}
            changed = True
        while waiting and (at_once is None or len(working) < at_once):
            number = waiting.pop(0)
            directory = runs[number]["directory"]
            runs[number] |= {"state": "given", "starts": len(starts(Path(directory)))}
            working[start(directory, f"{file.stem}/{number}", str(cancelled(file, number)))] = number
            changed = True
        if changed:
            write_whole(file, json.dumps(status, indent=2) + "\n")
        for future in wait(working, POLL_S).done:
            number = working.pop(future)
            code, reason = _ending(future)
            print(f"{runs[number]['directory']}: {reason}", flush=True)
            if number not in unwanted and _again(runs[number], code, status["restarts"]):
                runs[number] |= {"state": "waiting"}
                waiting.append(number)
            else:
                runs[number] |= {"state": "ended", "code": code, "cancelled": number in unwanted, "reason": reason}
            write_whole(file, json.dumps(status, indent=2) + "\n")
    return max((entry["code"] for entry in runs if not entry["cancelled"]), default=0)


def _ending(future: Future[int]) -> tuple[int, str]:
    """Exit code and words of a run's end; 75 where Ray has lost the worker or the node."""
    from ray.exceptions import RayError, RayTaskError, RuntimeEnvSetupError

    try:
        code = future.result()
    except Exception as error:
        lost = isinstance(error, RayError) and not isinstance(error, RayTaskError | RuntimeEnvSetupError)
        words = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        return (TryAgain if lost else RunFailed).exit_code, words
    return code, f"exit code {code}"


def _again(entry: dict[str, Any], code: int, restarts: int) -> bool:
    """Whether to start the run once more: as `work.again`, and not for ever where its process does not even begin."""
    if len(starts(Path(entry["directory"]))) > entry["starts"]:
        return work.again(Path(entry["directory"]), code, restarts)
    entry["unbegun"] = entry.get("unbegun", 0) + 1
    return code == TryAgain.exit_code and entry["unbegun"] <= restarts


def one_rank_each(cpus: float, gpus: float) -> Start:
    """Runs as Ray tasks; Ray lets as many begin as fit."""
    import ray

    task = ray.remote(num_cpus=cpus, num_gpus=gpus, max_retries=0)(ray_rank.alone)

    def start(directory: str, job: str, cancel: str) -> Future[int]:
        future: Future[int] = task.options(name=job).remote(directory, job, cancel).future()
        return future

    return start


def many_ranks(ranks: int, cpus: float, gpus: float, scratch: str, pool: ThreadPoolExecutor) -> Start:
    """Runs as Ray Train's trainers, each waited for by a thread of `pool`. Their own files go to `scratch`, which all
    nodes see; checkpoints are the runs' own."""

    def start(directory: str, job: str, cancel: str) -> Future[int]:
        return pool.submit(_train, directory, job, cancel, ranks, cpus, gpus, scratch)

    return start


def _train(directory: str, job: str, cancel: str, ranks: int, cpus: float, gpus: float, scratch: str) -> int:
    from ray.train import RunConfig, ScalingConfig, WorkerGroupError
    from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

    resources = {"CPU": cpus} | ({"GPU": gpus} if gpus else {})
    trainer = DataParallelTrainer(
        ray_rank.one_of_many,
        train_loop_config={"directory": directory, "job": job, "cancel": cancel},
        scaling_config=ScalingConfig(num_workers=ranks, use_gpu=bool(gpus), resources_per_worker=resources),
        run_config=RunConfig(name=job.replace("/", "-"), storage_path=scratch),
    )
    try:
        trainer.fit()
    except WorkerGroupError as error:
        codes = {e.code for e in error.worker_failures.values() if isinstance(e, ray_rank.RankEnded)}
        print(f"{directory}: {error}", flush=True)
        return max(codes - {TryAgain.exit_code}, default=TryAgain.exit_code)
    return 0


def main(file: Path) -> int:
    """Join the cluster that started this driver, and work through the status file."""
    import ray

    status = json.loads(file.read_text())
    ranks, cpus, gpus = status["ranks"], status["cpus_per_rank"], status["gpus_per_rank"]
    ray.init(log_to_driver=False)
    if ranks == 1:
        return drive(file, status, one_rank_each(cpus, gpus), status["parallel"])
    fit = room_for_ranks([node["Resources"] for node in ray.nodes() if node["Alive"]], cpus, gpus) // ranks
    at_once = status["parallel"] or max(1, fit)
    with TemporaryDirectory(prefix="ray-", dir=file.parent) as scratch, ThreadPoolExecutor(at_once) as pool:
        return drive(file, status, many_ranks(ranks, cpus, gpus, scratch, pool), at_once)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
