"""This machine as an engine: `python -m llmtrain.launch.local STATUS_FILE` runs a detached sweep, some runs at a time.

The supervisor's status file is whole at any moment, and the only thing that `jobs` and `cancel` need.
"""

import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from llmtrain.errors import TryAgain
from llmtrain.files import write_whole
from llmtrain.launch import work
from llmtrain.launch.engine import Job, Run, State
from llmtrain.processes import importable, lives, started

POLL_S = 0.2


class LocalEngine:
    """Handles are `STATUS_FILE#NUMBER`."""

    def submit(self, sweep: Path, runs: Sequence[Run]) -> Iterator[tuple[Run, str]]:
        """Start a supervisor that outlives this process and its terminal."""
        if not runs:
            return
        launch: Any = runs[0].infra.launch
        file = sweep.resolve() / f"local-{time.time_ns()}.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        status = {
            "parallel": launch.parallel,
            "restarts": launch.restarts,
            "supervisor": None,
            "runs": [{"directory": str(run.directory.resolve()), "state": "waiting"} for run in runs],
        }
        write_whole(file, json.dumps(status, indent=2) + "\n")
        with importable(), file.with_suffix(".log").open("ab") as log:
            process = subprocess.Popen(
                self._command(file), stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )
        _wait_for_supervisor(file, process)
        yield from ((run, f"{file}#{number}") for number, run in enumerate(runs))

    def script(self, sweep: Path, runs: Sequence[Run]) -> str:
        """The command of each run."""
        return "\n".join(" ".join(_command(run.directory.resolve(), number)) for number, run in enumerate(runs))

    def jobs(self, handles: Sequence[str]) -> dict[str, Job]:
        """By the supervisors' files, and whether the supervisors live."""
        return {handle: _job(handle) for handle in handles}

    def cancel(self, handles: Sequence[str]) -> None:
        """Ask each run to save and stop, and its supervisor not to start it again."""
        for handle in handles:
            file, number = _parsed(handle)
            _cancelled(file, number).touch()
            entry = _entry(handle)
            if entry and "pid" in entry and entry["state"] == "running":
                with suppress(ProcessLookupError):
                    os.kill(entry["pid"], signal.SIGTERM)

    def find(self, sweep: Path, runs: Sequence[Run]) -> dict[Path, str]:
        """The handles of those `runs`, by their directories, that a submission has begun which was killed before it
        could say so. A supervisor that has not come up yet is told not to."""
        wanted = {str(run.directory.resolve()): run.directory for run in runs}
        found = {}
        with _alone(sweep):
            for file in sorted(sweep.resolve().glob("local-*.json")):
                status = json.loads(file.read_text())
                if status["supervisor"] is None:
                    file.unlink()
                elif lives(status["supervisor"]):
                    for number, entry in enumerate(status["runs"]):
                        ends = entry["state"] == "ended" or _cancelled(file, number).exists()
                        if entry["directory"] in wanted and not ends:
                            found[wanted[entry["directory"]]] = f"{file}#{number}"
        return found

    def _command(self, file: Path) -> list[str]:
        return [sys.executable, "-m", "llmtrain.launch.local", str(file)]


def supervise(file: Path) -> None:
    """Run what is in the status file to its end, so many at a time as it says."""
    with _alone(file.parent):
        if not file.exists():
            return  # whoever submitted it was killed, and another one has submitted the runs again
        status = json.loads(file.read_text())
        status["supervisor"] = [os.getpid(), started(os.getpid())]
        write_whole(file, json.dumps(status, indent=2) + "\n")
    runs: list[dict[str, Any]] = status["runs"]

    def keep() -> None:
        write_whole(file, json.dumps(status, indent=2) + "\n")

    working: dict[int, subprocess.Popen[bytes]] = {}
    waiting = list(range(len(runs)))
    while waiting or working:
        for number in list(waiting):
            if _cancelled(file, number).exists():
                waiting.remove(number)
                runs[number] |= {"state": "ended", "code": TryAgain.exit_code, "cancelled": True}
                keep()
            elif len(working) < status["parallel"]:
                waiting.remove(number)
                process = subprocess.Popen(_command(Path(runs[number]["directory"]), number), stdin=subprocess.DEVNULL)
                working[number] = process
                runs[number] |= {"state": "running", "pid": process.pid}
                keep()
        time.sleep(POLL_S)
        for number, process in list(working.items()):
            if (code := process.poll()) is None:
                continue
            del working[number]
            directory, cancelled = Path(runs[number]["directory"]), _cancelled(file, number).exists()
            if not cancelled and work.again(directory, code if code >= 0 else TryAgain.exit_code, status["restarts"]):
                runs[number] |= {"state": "waiting"}
                waiting.append(number)
            else:
                runs[number] |= {"state": "ended", "code": code, "cancelled": cancelled}
            keep()


@contextmanager
def _alone(sweep: Path) -> Iterator[None]:
    """Among those who begin a supervisor, and those who look for what others began."""
    with (sweep / "local.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _command(directory: Path, number: int) -> list[str]:
    return [sys.executable, "-m", "llmtrain.launch.work", str(directory), "local", str(number)]


def _wait_for_supervisor(file: Path, process: subprocess.Popen[bytes]) -> None:
    """Until it has said that it lives: a command that returned has submitted."""
    while json.loads(file.read_text())["supervisor"] is None:
        if process.poll() is not None:
            raise RuntimeError(f"the supervisor ended with {process.returncode}; {file.with_suffix('.log')} says why")
        time.sleep(0.05)


def _job(handle: str) -> Job:
    entry = _entry(handle)
    if entry is None:
        return Job(State.UNKNOWN)
    node = os.uname().nodename
    if entry["state"] == "ended":
        reason = "cancelled" if entry.get("cancelled") else f"exit code {entry['code']}"
        return Job(State.ENDED, node, reason, entry["code"])
    if not lives(json.loads(_parsed(handle)[0].read_text())["supervisor"]):
        return Job(State.ENDED, node, "its supervisor has gone")
    return Job(State.RUNNING if entry["state"] == "running" else State.WAITING, node)


def _entry(handle: str) -> dict[str, Any] | None:
    file, number = _parsed(handle)
    if not file.exists():
        return None
    entry: dict[str, Any] = json.loads(file.read_text())["runs"][number]
    return entry


def _parsed(handle: str) -> tuple[Path, int]:
    file, _, number = handle.rpartition("#")
    return Path(file), int(number)


def _cancelled(file: Path, number: int) -> Path:
    return file.with_suffix(f".cancel-{number}")


if __name__ == "__main__":
    supervise(Path(sys.argv[1]))
