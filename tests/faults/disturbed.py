"""A small training that is disturbed, and what it has in common, at its end, with one that was not."""

import hashlib
import os
from collections.abc import Callable
from pathlib import Path

from tests.faults import faults, forkserver
from tests.faults.compare import assert_runs_equal
from tests.faults.faults import Before
from tests.faults.runs import PRETRAIN, PRETRAIN_NAME

TRAIN = ("train", *PRETRAIN, "trainer.budget_tokens=2_048")
"""8 steps; checkpoints after 3, 6 and 8."""
SAVE = "llmtrain.training.checkpoints:AtomicCheckpoints.save_checkpoint"
FIRST_ROW = ("mlflow:MlflowClient.log_batch", 2)
"""The params are the batch before."""


def run(
    directory: Path, *befalling: Before, words: tuple[str, ...] = TRAIN, function: Callable = faults.command
) -> tuple[int, str]:
    """Exit code and output of a command in a process of its own; no traceback is shown to anyone."""
    process = forkserver.start(function, directory, words, *befalling)
    return forkserver.finish(process), said(directory)


def said(directory: Path) -> str:
    """What was said since the last call."""
    output = (directory / "output.txt").read_text()
    (directory / "output.txt").unlink()
    assert "Traceback" not in output, output
    return output


def again(directory: Path, undisturbed: Path, continuing: str = "") -> str:
    """The same command ends as if nothing had happened; `continuing` from a checkpoint, where one is named."""
    code, output = run(directory)
    assert code == 0, output
    assert continuing in output
    assert_runs_equal(undisturbed, directory, PRETRAIN_NAME)
    return output


def contents(directory: Path) -> dict[str, str]:
    """The hash of each file."""
    files = (path for path in directory.rglob("*") if path.is_file() and not path.is_symlink())
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def cut_in_half(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)
