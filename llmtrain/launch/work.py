"""`python -m llmtrain.launch.work RUN_DIRECTORY ENGINE JOB`: all ranks of a frozen run that belong on this machine.

A run that takes several machines has one of these on each: JOB_COMPLETION_INDEX says which one this is, MASTER_ADDR and
MASTER_PORT where the first one is. The exit code is the run's; what is printed goes to the run's log.txt (of
further machines log-1.txt and so on), behind what earlier starts have printed.
"""

import os
import sys
from collections.abc import Callable
from pathlib import Path

from llmtrain.config.launch import AKSLaunch
from llmtrain.errors import Interrupted, LLMTrainError, TryAgain, UserError
from llmtrain.launch import rank, starts
from llmtrain.launch.engine import run_in


def work(directory: Path, engine: str, job: str) -> int:
    """Run the frozen run to its end or its stop; returns the exit code, of `llmtrain.errors`."""
    try:
        run = run_in(directory)
        if _index() == 0:
            starts.note(directory, engine, job)
        if run.infra.ranks == 1:
            return rank.main([str(directory)], leave=rank.leave)
        from llmtrain.training.ranks.torchrun import Nodes, run_ranks

        nodes = None
        if isinstance(run.infra.launch, AKSLaunch) and run.infra.launch.nodes > 1:
            meeting = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
            nodes = Nodes(run.infra.launch.nodes, _index(), meeting)
        run_ranks(directory, run.infra.ranks, nodes)
    except LLMTrainError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return Interrupted.exit_code
    return 0


def _index() -> int:
    """Which of the run's machines this is."""
    return int(os.environ.get("JOB_COMPLETION_INDEX", "0"))


def again(directory: Path, code: int, restarts: int, say: Callable[[str], None] = print) -> bool:
    """Whether a run that ended with `code` is to be started once more: it asks for it (75), and not in vain.

    `restarts` is how many starts in a row may bring no new checkpoint.
    """
    if code != TryAgain.exit_code:
        return False
    if (tries := starts.in_vain(directory)) > restarts:
        say(
            f"{directory}: {tries} starts in a row have not got beyond step {starts.newest_step(directory)}, and "
            f"infra.launch.restarts={restarts}: given up. {starts.LOG} says why; the same command tries again"
        )
        return False
    return True


def log_to(path: Path) -> None:
    """Append what this process and its children print, to either stream, to `path`."""
    sys.stdout.flush()
    sys.stderr.flush()
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    for stream in (1, 2):
        os.dup2(descriptor, stream)
    os.close(descriptor)


if __name__ == "__main__":
    rank.save_if_the_parent_dies()
    place = Path(sys.argv[1])
    if not place.is_dir():
        print(
            f"{place} is not here: is this machine's outputs directory that of the one that submits?", file=sys.stderr
        )
        rank.leave(UserError.exit_code)
    log_to(place / (f"log-{_index()}.txt" if _index() else starts.LOG))
    rank.leave(work(place, *sys.argv[2:]))
