"""Slurm, through Submitit: a sweep is an array, a run a job that comes back by itself until it has ended.

Submitit writes and submits the sbatch script; each task that srun starts is one rank, and decides nothing but whether
its job is requeued. A job that was told that its time is up (SIGUSR2), or lost a rank, has exit code 75 and requeues
itself; one that was preempted, or lost its node, Slurm requeues. `scancel` ends it for good.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import submitit
from submitit.core.utils import DelayedSubmission, FailedJobError, JobPaths
from submitit.helpers import TorchDistributedEnvironment

from llmtrain.config.launch import SlurmLaunch
from llmtrain.errors import LLMTrainError, TryAgain, UserError
from llmtrain.launch import rank, starts, work
from llmtrain.launch.engine import Job, Run, State
from llmtrain.processes import importable

LARGEST_ARRAY = 1000
"""Jobs in one array: one less than Slurm's default of MaxArraySize."""
ENDS_THE_TASKS_S = 60
"""How long a task waits to be ended by Slurm, after it has had its job requeued."""
STATES = {
    **dict.fromkeys(
        ("PENDING", "REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD", "RESV_DEL_HOLD", "CONFIGURING"), State.WAITING
    ),
    **dict.fromkeys(("RUNNING", "RESIZING", "SUSPENDED"), State.RUNNING),
    **dict.fromkeys(("COMPLETING", "STAGE_OUT", "STOPPED", "SIGNALING"), State.STOPPING),
}
"""Of those that Slurm tells of; all others have ended."""


@dataclass(frozen=True)
class Task:
    """What Submitit calls in each task that srun has started."""

    restarts: int

    def __call__(self, directory: str) -> None:
        """Be one rank of the frozen run in `directory`; ends the process with the run's exit code."""
        place = Path(directory)
        signal.signal(signal.SIGCONT, signal.SIG_DFL)  # Submitit would print each one
        work.log_to(place / starts.LOG)
        environment = submitit.JobEnvironment()
        TorchDistributedEnvironment().export(overwrite=True)
        if environment.global_rank == 0:
            try:
                starts.note(place, "slurm", environment.job_id)
            except LLMTrainError as error:
                print(error, file=sys.stderr)
                rank.leave(error.exit_code)
        self.leave(directory, rank.main([directory], leave=lambda code: self.leave(directory, code)))

    def leave(self, directory: str, code: int) -> None:
        """End this task, and have its job requeued where that helps."""
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # Slurm's way to end the tasks of a job that is requeued
        signal.signal(signal.SIGUSR2, signal.SIG_IGN)
        job = os.environ["SLURM_JOB_ID"]
        if code == TryAgain.exit_code and _is_running(job) and work.again(Path(directory), code, self.restarts):
            print(f"job {job} is requeued", flush=True)
            asked = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True)
            if asked.returncode == 0:
                time.sleep(ENDS_THE_TASKS_S)
            else:
                print(f"scontrol requeue {job}: {asked.stderr.strip()}", file=sys.stderr)
        rank.leave(code)


def _is_running(job: str) -> bool:
    """Not where it is being cancelled, preempted or requeued: then Slurm knows what comes next."""
    shown = subprocess.run(["scontrol", "--oneliner", "show", "job", job], capture_output=True, text=True)
    return "JobState=RUNNING" in shown.stdout


class SlurmEngine:
    """Handles are Slurm's job ids, `12` or `12_3`."""

    def __init__(self, launch: SlurmLaunch) -> None:
        self.launch = launch

    def submit(self, sweep: Path, runs: Sequence[Run]) -> Iterator[tuple[Run, str]]:
        """As `Engine.submit`. Raises UserError where there is no Slurm here, or where it refuses the job."""
        if runs and shutil.which("sbatch") is None:
            raise UserError("there is no sbatch here: submit on a login node of the cluster, or choose another infra")
        for start in range(0, len(runs), LARGEST_ARRAY):
            part = runs[start : start + LARGEST_ARRAY]
            executor = self._executor(sweep, part, arrays=-(-len(runs) // LARGEST_ARRAY))
            try:
                with importable():
                    jobs = executor.map_array(
                        Task(self.launch.restarts), [str(run.directory.resolve()) for run in part]
                    )
            except (FailedJobError, subprocess.CalledProcessError) as error:
                raise UserError(_in_words(error)) from error
            yield from zip(part, (job.job_id for job in jobs), strict=True)

    def script(self, sweep: Path, runs: Sequence[Run]) -> str:
        """The sbatch script of each array."""
        scripts = []
        for start in range(0, len(runs), LARGEST_ARRAY):
            part = runs[start : start + LARGEST_ARRAY]
            executor = self._executor(sweep, part, arrays=-(-len(runs) // LARGEST_ARRAY))
            if len(part) > 1:
                executor.parameters["map_count"] = len(part)  # as map_array does
            scripts.append(executor._make_submission_file_text(executor._submitit_command_str, "script"))
        return "\n".join(scripts)

    def jobs(self, handles: Sequence[str]) -> dict[str, Job]:
        """By squeue, which knows what is alive; of what it has forgotten, by sacct."""
        if not handles:
            return {}
        wanted = ",".join(handles)
        found = _table(["squeue", "--noheader", "--array", "--states=all", "--format=%i|%T|%N|%r", f"--jobs={wanted}"])
        gone = [handle for handle in handles if handle not in found]
        if gone and shutil.which("sacct"):
            columns = "--format=JobID,State,NodeList,ExitCode"
            found |= _table(
                ["sacct", "--allocations", "--noheader", "--parsable2", columns, f"--jobs={','.join(gone)}"]
            )
        return {handle: found.get(handle, Job(State.UNKNOWN)) for handle in handles}

    def find(self, sweep: Path, runs: Sequence[Run]) -> dict[Path, str]:
        """By the name that all jobs of the sweep have, and what Submitit has kept for each. A submission that was
        killed before that was kept has nothing to start."""
        if not shutil.which("squeue"):
            return {}
        wanted = {str(run.directory.resolve()): run.directory for run in runs}
        named = ["squeue", "--noheader", "--array", "--format=%i|%T|%N|%r", f"--name=llmtrain-{sweep.name}"]
        found = {}
        for handle, job in _table(named).items():
            kept = JobPaths((sweep / "slurm").resolve(), handle).submitted_pickle
            if job.state in (State.WAITING, State.RUNNING) and kept.exists():
                [directory] = DelayedSubmission.load(kept).args
                if directory in wanted:
                    found[wanted[directory]] = handle
        return found

    def cancel(self, handles: Sequence[str]) -> None:
        """By scancel: SIGTERM, upon which runs save, and SIGKILL after the cluster's KillWait."""
        subprocess.run(["scancel", *handles], check=False)

    def _executor(self, sweep: Path, runs: Sequence[Run], arrays: int) -> submitit.SlurmExecutor:
        launch, infra = self.launch, runs[0].infra
        ranks_per_node = infra.ranks // launch.nodes
        given: dict[str, Any] = {
            "job_name": f"llmtrain-{sweep.name}",
            "partition": launch.partition,
            "account": launch.account,
            "qos": launch.qos,
            "nodes": launch.nodes,
            "ntasks_per_node": ranks_per_node,
            "cpus_per_task": launch.cpus_per_rank,
            "mem": f"{launch.memory_gib_per_node}G" if launch.memory_gib_per_node else None,
            "time": launch.minutes,
            "signal_delay_s": launch.grace_seconds,
            "stderr_to_stdout": True,
            "setup": list(launch.setup),
        }
        if launch.gpus_per_rank:
            kind = f":{launch.gpu_type}" if launch.gpu_type else ""
            given["gres"] = f"gpu{kind}:{launch.gpus_per_rank * ranks_per_node}"
        given["array_parallelism"] = max(1, launch.parallel // arrays) if launch.parallel else len(runs)
        options = dict(option.partition("=")[::2] for option in launch.options)
        given["additional_parameters"] = {"requeue": True, **{name: value or True for name, value in options.items()}}
        executor = _Executor(folder=(sweep / "slurm").resolve())
        executor.update_parameters(**{name: value for name, value in given.items() if value is not None})
        return executor


class _Executor(submitit.SlurmExecutor):
    """Scripts can be shown where there is no Slurm."""

    @classmethod
    def affinity(cls) -> int:
        return 2


def _table(command: list[str]) -> dict[str, Job]:
    """The jobs that `command` prints as `id|STATE|node|reason`; none where it fails."""
    printed = subprocess.run(command, capture_output=True, text=True)
    found = {}
    for line in printed.stdout.splitlines():
        handle, state, node, reason = line.split("|")
        name = re.split(r"[ +]", state)[0]  # `CANCELLED by 0`
        kind = STATES.get(name, State.ENDED)
        words = name.lower() + ("" if reason in ("None", "", "0:0") else f", {reason}")
        found[handle] = Job(kind, "" if node in ("None assigned", "(null)") else node, words)
    return found


def _in_words(error: Exception) -> str:
    """What sbatch said, and what to do."""
    said = str(error).strip().splitlines()
    lines = [line for line in said if line.startswith("sbatch:")] or said[-1:]
    return f"Slurm refuses the job: {' '.join(lines)}; see `sinfo` and `sacctmgr show assoc`, and set infra.launch.*"
