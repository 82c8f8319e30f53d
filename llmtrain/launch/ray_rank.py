"""What runs on the nodes of a Ray cluster: a Ray worker, and under it a process of its own for each rank.

The rank's process decides by its exit code, saves when it is told to stop, and also when its Ray worker dies without a
word. `python -m llmtrain.launch.ray_rank RUN_DIRECTORY JOB` is that process.
"""

import fcntl
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

from llmtrain.errors import LLMTrainError, TryAgain
from llmtrain.launch import rank, starts, work

POLL_S = 0.5
HEAD_START_S = 2.0
"""By which a rank that has failed is seen before those that only lost it."""
LAST_SAVE_S = 120.0
"""How long a start waits for the process of the one before, which may still be saving on another node."""


class RankEnded(Exception):
    """A rank of many ended with another exit code than 0."""

    def __init__(self, code: int) -> None:
        super().__init__(code)
        self.code = code


def alone(directory: str, job: str, cancel: str) -> int:
    """The Ray task of a run that has one rank; returns its exit code, 75 where it was killed.

    `cancel` is the file whose being there asks for an end.
    """
    return _watched(directory, job, cancel, {})


def one_of_many(settings: dict[str, str]) -> None:
    """The function of each of Ray Train's workers. Raises RankEnded unless the rank ends well."""
    from ray.train import get_context
    from ray.train.collective import broadcast_from_rank_zero

    context = get_context()
    meeting = broadcast_from_rank_zero(_meeting_place() if context.get_world_rank() == 0 else None)
    place = {
        "RANK": str(context.get_world_rank()),
        "WORLD_SIZE": str(context.get_world_size()),
        "LOCAL_WORLD_SIZE": str(context.get_local_world_size()),
        "LOCAL_RANK": "0",  # Ray lets each worker see its own GPUs only
        **meeting,
    }
    code = _watched(settings["directory"], settings["job"], settings["cancel"], place)
    if code == TryAgain.exit_code:
        time.sleep(HEAD_START_S)
    if code:
        raise RankEnded(code)


def _meeting_place() -> dict[str, str]:
    from ray.util import get_node_ip_address

    with socket.socket() as free:
        free.bind(("", 0))
        return {"MASTER_ADDR": get_node_ip_address(), "MASTER_PORT": str(free.getsockname()[1])}


def _watched(directory: str, job: str, cancel: str, place: dict[str, str]) -> int:
    """Run a rank's process to its end, and tell it to stop when `cancel` is there."""
    if Path(cancel).exists():
        return TryAgain.exit_code
    command = [sys.executable, "-m", "llmtrain.launch.ray_rank", directory, job]
    process = subprocess.Popen(command, env=os.environ | place, cwd=directory, stdin=subprocess.DEVNULL)
    told = False
    while True:
        try:
            code = process.wait(POLL_S)
            return code if code >= 0 else TryAgain.exit_code
        except subprocess.TimeoutExpired:
            if not told and Path(cancel).exists():
                process.terminate()
                told = True


def main(directory: Path, job: str) -> int:
    """Be the rank that the environment names; returns the exit code, of `llmtrain.errors`."""
    if os.environ.get("RANK", "0") == "0":
        try:
            _wait_for_the_last_start(directory)
            starts.note(directory, "ray", job)
        except LLMTrainError as error:
            print(error, file=sys.stderr)
            return error.exit_code
    return rank.main([str(directory)], leave=rank.leave)


def _wait_for_the_last_start(directory: Path) -> None:
    """Until no other process works on the run, or has for too long: then this one finds the lock held, and says so."""
    until = time.monotonic() + LAST_SAVE_S
    with (directory / "lock").open("w") as file:
        while time.monotonic() < until:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                time.sleep(POLL_S)


if __name__ == "__main__":
    work.log_to(Path(sys.argv[1]) / starts.LOG)
    rank.save_if_the_parent_dies()
    rank.leave(main(Path(sys.argv[1]), sys.argv[2]))
