"""`python train.py` without the seconds of imports: each start is a fork of one process that has done them.

The server is the standard library's. It has imported and run nothing, so that a child inherits no thread, no database
and no drawn numbers: it seeds the random generators from the system, as a new process would, and calls what train.py
calls. `tests/faults/test_kill.py` compares with real `python train.py` processes too.
"""

import multiprocessing
import os
import sys
from collections.abc import Callable
from multiprocessing import forkserver
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

from tests.faults import moments
from tests.faults.moments import Moment

PRELOADED = (
    "llmtrain.cli.train",
    "llmtrain.config.compose",
    "llmtrain.training.run",
    "matplotlib.backends.backend_agg",
    "mlflow.store.model_registry.sqlalchemy_store",
    "mlflow.store.tracking.sqlalchemy_store",
    "transformers.models.qwen3.modeling_qwen3",
)
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_LOGGING_LEVEL": "CRITICAL"}
"""What the imports read: one thread, which forks well."""
TIMEOUT_S = 300

context = multiprocessing.get_context("forkserver")


def start_server() -> None:
    """Start the server; it ends with this process."""
    before = dict(os.environ)
    os.environ.update(ENVIRONMENT)
    context.set_forkserver_preload(list(PRELOADED))
    forkserver.ensure_running()
    os.environ.clear()
    os.environ.update(before)


def start(function: Callable[..., Any], directory: Path, *arguments: Any) -> ForkServerProcess:
    """Start a fork of the server that calls `function` in `directory`; what it says is added to `output.txt` there."""
    process = context.Process(target=_run, args=(function, directory, *arguments))
    process.start()
    return process


def finish(process: ForkServerProcess) -> int:
    """The exit code; negative where a signal ended the process."""
    process.join(TIMEOUT_S)
    if process.exitcode is None:
        process.kill()
        raise AssertionError(f"no end within {TIMEOUT_S} s")
    return process.exitcode


def train(overrides: tuple[str, ...], moment: Moment | None = None, restore: bool = True) -> int:
    """`python train.py OVERRIDES`, killed at `moment`; without `restore`, checkpoints restore no random generator."""
    phases = moments.Killer(moment) if moment else moments.Phases()
    moments.follow(phases)
    if not restore:
        moments.forget_random_state()
    return _main(overrides, phases)


def measured(overrides: tuple[str, ...]) -> int:
    """The same, undisturbed; writes `extents.json`."""
    phases = moments.Meter()
    moments.follow(phases)
    code = _main(overrides, phases)
    phases.write()
    return code


def create_database() -> int:
    """The tracking database of an empty outputs directory."""
    from llmtrain.telemetry.database import open_database

    open_database(Path("outputs"))
    return 0


def server_state() -> int:
    """Write what the server, this process's parent, has: `state.json` with modules, threads and open files."""
    import json

    server = Path(f"/proc/{os.getppid()}")
    state = {
        "modules": [name for name in PRELOADED if name in sys.modules],
        "threads": [(task / "comm").read_text().strip() for task in (server / "task").iterdir()],
        "files": [str(file.readlink()) for file in (server / "fd").iterdir()],
    }
    Path("state.json").write_text(json.dumps(state))
    return 0


def _main(overrides: tuple[str, ...], phases: moments.Phases) -> int:
    from llmtrain.cli.train import main

    code = main(list(overrides))
    phases.enter("over")
    return code


def _run(function: Callable[..., int], directory: Path, *arguments: Any) -> None:
    import random

    import numpy as np
    import torch

    os.chdir(directory)
    output = os.open("output.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    for seed in (random.seed, np.random.seed, torch.seed):
        seed()
    sys.exit(function(*arguments))
