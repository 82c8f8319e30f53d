"""`python -m llmtrain.launch.rank RUN_DIRECTORY`: one rank of a frozen run, or all of a run that has one.

Whoever starts it sets RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT where there are several: torchrun's
agent (training/ranks/torchrun.py), Slurm, Ray, Kubernetes. Nothing is composed: the run's config.json says everything.
Exit codes are those of `llmtrain.errors`.
"""

import ctypes
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from types import FrameType

from llmtrain.errors import Interrupted, LLMTrainError, TryAgain, UserError
from llmtrain.files import in_words

PARENT_DIES = 1  # PR_SET_PDEATHSIG of prctl(2)
HEAD_START_S = 5.0
"""By which rank 0's end is seen before that of another rank, which would have it stopped."""


def main(argv: list[str] | None = None, leave: Callable[[int], None] | None = None) -> int:
    """Work as the rank that the environment names, until the run ends; any exception is a printed message and a code.

    With `leave`, signals that come before or after the steps, when nothing has to be saved, call it with 75; without
    it they are left as they were.
    """
    try:
        [directory] = sys.argv[1:] if argv is None else argv
    except ValueError:
        print("python -m llmtrain.launch.rank RUN_DIRECTORY", file=sys.stderr)
        return UserError.exit_code
    rank = int(os.environ.get("RANK", "0"))
    if leave is not None:
        _leave_if_asked(directory, leave)
    try:
        return _work(Path(directory), rank)
    except KeyboardInterrupt:
        return Interrupted.exit_code
    except LLMTrainError as error:
        return _ended(error, rank)
    except OSError as error:
        if words := in_words(error):
            return _ended(words, rank)
        traceback.print_exc()
    except Exception:
        traceback.print_exc()
    return 1


def _leave_if_asked(directory: str, leave: Callable[[int], None]) -> None:
    def asked(number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        print(f"{name}: stopping; what {directory} has saved stays: the same command continues", file=sys.stderr)
        leave(TryAgain.exit_code)

    for number in (signal.SIGTERM, signal.SIGUSR2):
        signal.signal(number, asked)


def _work(directory: Path, rank: int) -> int:
    import torch.distributed as dist

    from llmtrain.training.run import train_rank

    try:
        train_rank(directory)
    except RuntimeError as error:
        if isinstance(error, dist.DistError) or "Connection closed by peer" in str(error) or "gloo" in str(error):
            print(f"rank {rank} has lost another rank and stops", file=sys.stderr)
            return TryAgain.exit_code
        raise
    return 0


def _ended(error: LLMTrainError, rank: int) -> int:
    """Leave the message to torchrun's agent, which shows it once; print it where there is none. Returns the code."""
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    if place := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        said = {"message": str(error), "timestamp": int(time.time()), "exit_code": error.exit_code}
        Path(place).write_text(json.dumps(said))
    else:
        print(f"rank {rank}: {error}" if several else error, file=sys.stderr)
    if rank:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(HEAD_START_S)
    return error.exit_code


def save_if_the_parent_dies() -> None:
    """Have SIGTERM sent to this process when its parent ends without a word, so that no orphan goes on for days."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PARENT_DIES, signal.SIGTERM)


def leave(code: int) -> None:
    """End this process at once: Python's own way out aborts where a thread of gloo waits for a rank that has gone."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    save_if_the_parent_dies()
    leave(main())
