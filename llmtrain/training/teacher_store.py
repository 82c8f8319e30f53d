"""The files of `outputs/teacher/<key>/`: for each target of some rows of text, a teacher's likeliest next tokens.

train.rows.npy                 [rows] int64, rising: which rows of the split are kept, of held-out splits all
train.log_probs-00000.float16  [targets, k + 1]: of the k likeliest tokens, then of all others together; in shards
train.ids-00000.uint16         [targets, k]: which tokens; the suffix is the type
sha256                         of each of these files, by its name
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from llmtrain.data.text import memory_map, smallest_dtype
from llmtrain.files import sha256_of
from llmtrain.training.divergences import TopK

SHARD_TARGETS = 2**20
"""Most targets in one file."""
HASHES = "sha256"


class TeacherRows:
    """One split's part of a store, memory-mapped: only what is read takes memory."""

    def __init__(self, directory: Path, split: str, top_k: int, sequence_tokens: int) -> None:
        self.rows: npt.NDArray[np.int64] = np.load(directory / f"{split}.rows.npy")
        self.log_probs = [memory_map(path).reshape(-1, top_k + 1) for path in _shards(directory, f"{split}.log_probs")]
        self.ids = [memory_map(path).reshape(-1, top_k) for path in _shards(directory, f"{split}.ids")]
        self.starts = np.cumsum([0, *map(len, self.ids)])
        self.sequence_tokens = sequence_tokens

    @property
    def num_targets(self) -> int:
        return int(self.starts[-1])

    def of(self, rows: Sequence[int], device: torch.device | str) -> TopK:
        """What the teacher says of each target of `rows`, one row after the other; the targets of a row in order."""
        parts = [part for row in rows for part in self._parts(row)]
        log_probs = np.concatenate([self.log_probs[0][:0], *(self.log_probs[shard][here] for shard, here in parts)])
        ids = np.concatenate([self.ids[0][:0], *(self.ids[shard][here] for shard, here in parts)]).astype(np.int64)
        return TopK(torch.from_numpy(log_probs).to(device), torch.from_numpy(ids).to(device))

    def _parts(self, row: int) -> Iterator[tuple[int, slice]]:
        """Where the row's targets lie: the shard, and which of its targets."""
        place = int(np.searchsorted(self.rows, row))
        assert row in self.rows[place : place + 1], f"the teacher was not asked about row {row}"
        start = place * self.sequence_tokens
        stop = min(start + self.sequence_tokens, self.num_targets)
        while start < stop:
            shard = int(np.searchsorted(self.starts, start, side="right")) - 1
            end = min(stop, int(self.starts[shard + 1]))
            yield shard, slice(start - int(self.starts[shard]), end - int(self.starts[shard]))
            start = end


class Writer:
    """Writes one split; ids are less than `num_ids`."""

    def __init__(self, directory: Path, split: str, rows: Sequence[int], num_ids: int) -> None:
        np.save(directory / f"{split}.rows.npy", np.array(rows, dtype=np.int64))
        self.log_probs = _ArrayWriter(directory, f"{split}.log_probs", np.dtype("<f2"))
        self.ids = _ArrayWriter(directory, f"{split}.ids", smallest_dtype(num_ids))

    def append(self, found: TopK) -> None:
        """Add what the teacher says of the next targets."""
        self.log_probs.append(found.log_probs.clamp(min=torch.finfo(torch.float16).min))
        self.ids.append(found.ids)


def write_hashes(directory: Path) -> None:
    """The last file of a store."""
    (directory / HASHES).write_text(json.dumps(_hashes(directory)))


def is_whole(directory: Path) -> bool:
    """Whether each file has the content that was written, and none is missing or one too many."""
    try:
        written = json.loads((directory / HASHES).read_bytes())
    except (OSError, ValueError):
        return False
    return bool(written == _hashes(directory))


def _hashes(directory: Path) -> dict[str, str]:
    return {path.name: sha256_of(path) for path in sorted(directory.iterdir()) if path.name != HASHES}


class _ArrayWriter:
    """One array in shards of `SHARD_TARGETS` targets."""

    def __init__(self, directory: Path, name: str, dtype: np.dtype[np.generic]) -> None:
        self.directory, self.name, self.dtype = directory, name, dtype
        self.written = 0

    def append(self, tensor: Tensor) -> None:
        array = tensor.cpu().numpy().astype(self.dtype)
        while len(array):
            number, filled = divmod(self.written, SHARD_TARGETS)
            part, array = np.split(array, [SHARD_TARGETS - filled])
            with (self.directory / f"{self.name}-{number:05d}.{self.dtype.name}").open("ab") as shard:
                shard.write(part.tobytes())
            self.written += len(part)


def _shards(directory: Path, name: str) -> list[Path]:
    return sorted(directory.glob(f"{name}-*"))
