"""`python -m llmtrain.cli.rank RUN_DIRECTORY`: one rank of a frozen run.

torchrun starts it (training/ranks/torchrun.py), or any launcher that sets RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and
MASTER_PORT. Nothing is composed: the run's config.json says everything. Exit codes are those of `llmtrain.errors`.
"""

import ctypes
import json
import os
import signal
import sys
import time
import traceback
from pathlib import Path

from llmtrain.cli import UsageError
from llmtrain.errors import Interrupted, LLMTrainError, TryAgain
from llmtrain.files import in_words

PARENT_DIES = 1  # PR_SET_PDEATHSIG of prctl(2)
HEAD_START_S = 5.0
"""By which rank 0's end is seen before that of another rank, which would have it stopped."""


def main(argv: list[str] | None = None) -> int:
    """Work as the rank that the environment names, until the run ends."""
    try:
        [directory] = sys.argv[1:] if argv is None else argv
    except ValueError:
        print(UsageError("python -m llmtrain.cli.rank RUN_DIRECTORY"), file=sys.stderr)
        return UsageError.exit_code
    _save_if_the_launcher_dies()
    import torch.distributed as dist

    from llmtrain.training.run import train_rank

    rank = int(os.environ["RANK"])
    try:
        train_rank(Path(directory))
    except LLMTrainError as error:
        return _ended(error, rank)
    except OSError as error:
        if words := in_words(error):
            return _ended(words, rank)
        raise
    except RuntimeError as error:
        if isinstance(error, dist.DistError) or "Connection closed by peer" in str(error) or "gloo" in str(error):
            print(f"rank {rank} has lost another rank and stops", file=sys.stderr)
            return TryAgain.exit_code
        raise
    return 0


def _ended(error: LLMTrainError, rank: int) -> int:
    """Leave the message to torchrun's agent, which shows it once; print it where there is none. Returns the code."""
    if place := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        Path(place).write_text(json.dumps({"message": str(error), "timestamp": int(time.time())}))
    else:
        print(f"rank {rank}: {error}", file=sys.stderr)
    if rank:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(HEAD_START_S)
    return error.exit_code


def _save_if_the_launcher_dies() -> None:
    """Have SIGTERM sent to this process when its parent ends without a word, so that no orphan goes on for days."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PARENT_DIES, signal.SIGTERM)


if __name__ == "__main__":
    try:
        code = main()
    except KeyboardInterrupt:
        code = Interrupted.exit_code
    except Exception:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # at once: Python's own way out aborts where a thread of gloo waits for a rank that has gone
