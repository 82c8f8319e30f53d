"""Checkpoints that are complete or do not exist.

    checkpoints/step-00000040/state.pt        weights, optimizer, tokens, random generators
    checkpoints/step-00000040/shards/, zero/  instead of the first two, the parts that several ranks hold (ranks/)
    checkpoints/step-00000040/manifest.json   size and hash of each file: written last
    checkpoints/best -> step-00000040         lowest validation loss so far

A checkpoint is written to `step-….writing`, by all ranks together, fsynced, and renamed once its manifest is there.
Reading checks the hashes and falls back to the one before, so neither a kill at any moment nor a damaged file costs
more than one interval.
"""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

from lightning.pytorch.plugins.io import CheckpointIO

from llmtrain.errors import IntegrityError
from llmtrain.files import sha256_of
from llmtrain.training.ranks.alone import Alone


class AtomicCheckpoints(CheckpointIO):
    """Lightning's door to the checkpoint directories: `path` is a directory `step-…`. All of the `ranks` go through."""

    def __init__(self, ranks: Alone | None = None) -> None:
        self.ranks = ranks or Alone()

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        ranks = self.ranks
        with ranks.whole_directory(Path(path)) as directory:
            ranks.save(checkpoint, directory)
            ranks.gathered(None)  # all files are there
            mine = sorted(file for file in directory.rglob("*") if file.is_file())[ranks.rank :: ranks.size]
            hashed = {
                file.relative_to(directory).as_posix(): {"bytes": file.stat().st_size, "sha256": sha256_of(file)}
                for file in mine
            }
            manifest = dict(sorted(entry for part in ranks.gathered(hashed) for entry in part.items()))
            if ranks.rank == 0:
                (directory / "manifest.json").write_text(json.dumps(manifest, indent=2))

    def load_checkpoint(self, path: str | Path, map_location: Any = "cpu", weights_only: Any = True) -> dict[str, Any]:
        if self.ranks.rank == 0:
            verify(Path(path))
        return self.ranks.load(Path(path))

    def remove_checkpoint(self, path: str | Path) -> None:
        shutil.rmtree(path)


def verify(directory: Path) -> None:
    """Raises IntegrityError unless every file of the manifest is there as it was written."""
    try:
        manifest = json.loads((directory / "manifest.json").read_text())
    except (OSError, ValueError) as error:
        raise IntegrityError(f"{directory}: no readable manifest ({error})") from error
    if not manifest:
        raise IntegrityError(f"{directory}: its manifest names no file")
    for name, written in manifest.items():
        path = directory / name
        if not path.exists() or path.stat().st_size != written["bytes"] or sha256_of(path) != written["sha256"]:
            raise IntegrityError(f"{path} is not as it was written")


def any_in(directory: Path) -> bool:
    """Has a run got as far as a checkpoint? Whether one verifies is for `newest` to say."""
    return bool(_complete(directory))


def newest(directory: Path) -> Path | None:
    """The newest checkpoint that verifies; damaged ones are passed over with a word on stderr."""
    for candidate in sorted(_complete(directory), reverse=True):
        try:
            verify(candidate)
            return candidate
        except IntegrityError as error:
            print(f"passing over a damaged checkpoint: {error}", file=sys.stderr)
    return None


def mark_best(checkpoint: Path) -> None:
    """Point `best` at `checkpoint`."""
    link = checkpoint.with_name("best.writing")
    link.unlink(missing_ok=True)
    link.symlink_to(checkpoint.name)
    link.rename(checkpoint.with_name("best"))


def prune(directory: Path, keep: int = 2) -> None:
    """Remove all but the newest `keep` checkpoints and the best one, and what a kill left half-written."""
    best = directory / "best"
    wanted = {*sorted(_complete(directory))[-keep:], best.resolve()}
    for path in directory.iterdir():
        if path.is_dir() and not path.is_symlink() and path not in wanted and path.resolve() not in wanted:
            shutil.rmtree(path)


def _complete(directory: Path) -> list[Path]:
    return [path for path in directory.glob("step-*") if not path.name.endswith(".writing")]


def step_of(checkpoint: Path) -> int:
    """The number of steps that a checkpoint has behind it."""
    return int(checkpoint.name.removeprefix("step-"))
