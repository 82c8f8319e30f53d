"""Tokens of documents on disk: flat little-endian arrays, cut into shards, read by memory map.

train-00000.uint16, train-00001.uint16, ...   the split's tokens, one stream; the suffix is the type
train.offsets.npy                             where each document begins in that stream, and where the last one ends
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from llmtrain.artifacts import SplitCounts

Ids = npt.NDArray[Any]


def smallest_dtype(num_ids: int) -> np.dtype[Any]:
    """Little-endian unsigned integers that hold the ids 0 to num_ids - 1."""
    return np.dtype("<u2") if num_ids <= 2**16 else np.dtype("<u4")


class ShardWriter:
    """Writes one split; `close` completes it and counts."""

    def __init__(self, directory: Path, split: str, dtype: np.dtype[Any], shard_tokens: int) -> None:
        self.directory, self.split, self.dtype, self.shard_tokens = directory, split, dtype, shard_tokens
        self.offsets = [0]
        self.num_bytes = 0

    def append(self, document_ids: Sequence[int], num_bytes: int) -> None:
        """Add one document of `num_bytes` of text. It may go on in the next shard."""
        self.num_bytes += num_bytes
        ids = np.asarray(document_ids, dtype=self.dtype)
        begin = self.offsets[-1]
        self.offsets.append(begin + len(ids))
        while len(ids):
            number, filled = divmod(begin, self.shard_tokens)
            part, ids = np.split(ids, [self.shard_tokens - filled])
            with (self.directory / f"{self.split}-{number:05d}.{self.dtype.name}").open("ab") as shard:
                shard.write(part.tobytes())
            begin += len(part)

    def close(self) -> SplitCounts:
        np.save(self.directory / f"{self.split}.offsets.npy", np.array(self.offsets, dtype=np.int64))
        return SplitCounts(num_documents=len(self.offsets) - 1, num_tokens=self.offsets[-1], num_bytes=self.num_bytes)


class TokenShards:
    """One split of prepared text as one stream of tokens. Memory-mapped: only what is read takes memory."""

    def __init__(self, directory: Path, split: str) -> None:
        self.directory, self.split = directory, split
        self._shards = [memory_map(path) for path in sorted(directory.glob(f"{split}-*.uint*"))]
        self._starts = np.cumsum([0, *map(len, self._shards)])
        self.offsets: npt.NDArray[np.int64] = np.load(directory / f"{split}.offsets.npy", mmap_mode="r")

    def __reduce__(self) -> tuple[Any, ...]:
        return TokenShards, (self.directory, self.split)  # a worker process maps the files itself

    @property
    def num_tokens(self) -> int:
        return int(self._starts[-1])

    @property
    def num_documents(self) -> int:
        return len(self.offsets) - 1

    def document(self, index: int) -> npt.NDArray[np.int64]:
        """[tokens] of one document, its end-of-text token included."""
        return self.tokens(int(self.offsets[index]), int(self.offsets[index + 1]))

    def num_rows(self, sequence_tokens: int) -> int:
        """Whole training rows."""
        return max(0, self.num_tokens - 1) // sequence_tokens

    def row(self, index: int, sequence_tokens: int) -> npt.NDArray[np.int64]:
        """[sequence_tokens + 1] tokens: neighbouring rows share one, so each token but the first is a target once."""
        assert 0 <= index < self.num_rows(sequence_tokens), f"row {index} of {self.num_rows(sequence_tokens)}"
        return self.tokens(index * sequence_tokens, (index + 1) * sequence_tokens + 1)

    def evaluation_rows(self, sequence_tokens: int) -> Iterator[npt.NDArray[np.int64]]:
        """All rows in order, the last one shorter where the tokens end: each token but the first is a target once."""
        for start in range(0, self.num_tokens - 1, sequence_tokens):
            yield self.tokens(start, min(start + sequence_tokens + 1, self.num_tokens))

    def token_counts(self, num_ids: int = 0) -> npt.NDArray[np.int64]:
        """[max(num_ids, largest id + 1)] how often each id occurs: what a unigram model knows."""
        counts = np.zeros(num_ids, dtype=np.int64)
        for shard in self._shards:
            for part in np.array_split(shard, -(-len(shard) // 2**22)):
                more = np.bincount(part, minlength=len(counts))
                more[: len(counts)] += counts
                counts = more
        return counts

    def tokens(self, start: int, stop: int) -> npt.NDArray[np.int64]:
        """[stop - start] tokens of the stream."""
        first = int(np.searchsorted(self._starts, start, side="right")) - 1
        parts = []
        for number in range(first, len(self._shards)):
            begin = int(self._starts[number])
            if begin >= stop:
                break
            parts.append(self._shards[number][max(0, start - begin) : stop - begin])
        return np.concatenate(parts).astype(np.int64)


def memory_map(path: Path) -> Ids:
    """The array of a file whose suffix is its type."""
    return np.memmap(path, dtype=np.dtype(path.suffix[1:]).newbyteorder("<"), mode="r")
