"""Preference pairs on disk, read by memory map.

train.pairs.uint16    the ids of each pair one after the other: prompt, chosen, rejected; the suffix is the type
train.offsets.npy     [3 * pairs + 1] where each of these begins, and where the last one ends
train.jsonl           the text of each pair, a line each
train.lines.npy       [pairs + 1] the byte at which each line begins, and where the last one ends
train.desirable.npy   [pairs] of votes on single answers only: was the answer found good

A vote stands there as a pair: its prompt, its answer in the place of the chosen one, and in the place of the rejected
one the answer to another prompt, by which KTO estimates how far the policy has moved (arXiv 2402.01306, section 4).
"""

import json
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from llmtrain.artifacts import SplitCounts
from llmtrain.data.text import Ids, memory_map


@dataclass(frozen=True)
class PairText:
    """A prompt and two answers, the first of which is preferred."""

    prompt: str
    chosen: str
    rejected: str
    where: str
    """file:line, or the name of the document that it was cut from."""


@dataclass(frozen=True)
class Pair:
    """The ids of a pair: [prompt tokens], [chosen tokens], [rejected tokens]."""

    prompt_ids: Ids
    chosen_ids: Ids
    rejected_ids: Ids


class PairWriter:
    """Writes one split; `close` completes it and counts."""

    def __init__(self, directory: Path, split: str, dtype: np.dtype[Any]) -> None:
        self.directory, self.split, self.dtype = directory, split, dtype
        self.offsets, self.lines, self.is_desirable = [0], [0], list[bool]()
        self.num_bytes = 0
        self.ids_file = (directory / f"{split}.pairs.{dtype.name}").open("wb")
        self.text_file = (directory / f"{split}.jsonl").open("wb")

    def append(self, pair: Pair, text: PairText, is_desirable: bool | None = None) -> None:
        """Add a pair, or a vote with its label; a split has one or the other."""
        if is_desirable is not None:
            self.is_desirable.append(is_desirable)
        for ids in (pair.prompt_ids, pair.chosen_ids, pair.rejected_ids):
            self.offsets.append(self.offsets[-1] + len(ids))
            self.ids_file.write(np.asarray(ids, dtype=self.dtype).tobytes())
        self.num_bytes += sum(len(part.encode()) for part in (text.prompt, text.chosen, text.rejected))
        line = json.dumps(asdict(text), ensure_ascii=False).encode() + b"\n"
        self.lines.append(self.lines[-1] + len(line))
        self.text_file.write(line)

    def close(self) -> SplitCounts:
        self.ids_file.close()
        self.text_file.close()
        np.save(self.directory / f"{self.split}.offsets.npy", np.array(self.offsets, dtype=np.int64))
        np.save(self.directory / f"{self.split}.lines.npy", np.array(self.lines, dtype=np.int64))
        if self.is_desirable:
            np.save(self.directory / f"{self.split}.desirable.npy", np.array(self.is_desirable, dtype=np.bool_))
        return SplitCounts(num_documents=len(self.lines) - 1, num_tokens=self.offsets[-1], num_bytes=self.num_bytes)


class PreferencePairs:
    """One split of prepared pairs."""

    def __init__(self, directory: Path, split: str) -> None:
        self.directory, self.split = directory, split
        (path,) = directory.glob(f"{split}.pairs.uint*")
        self._ids = memory_map(path)
        self._offsets: npt.NDArray[np.int64] = np.load(directory / f"{split}.offsets.npy", mmap_mode="r")
        self._lines: npt.NDArray[np.int64] = np.load(directory / f"{split}.lines.npy", mmap_mode="r")

        labels = directory / f"{split}.desirable.npy"
        self._is_desirable: npt.NDArray[np.bool_] | None = np.load(labels) if labels.exists() else None

    def __reduce__(self) -> tuple[Any, ...]:
        return PreferencePairs, (self.directory, self.split)  # a worker process maps the files itself

    def __len__(self) -> int:
        return len(self._lines) - 1

    def __getitem__(self, index: int) -> Pair:
        """Raises IndexError past the end, so that `for pair in pairs` ends."""
        if not 0 <= index < len(self):
            raise IndexError(f"pair {index} of {len(self)}")
        borders = self._offsets[3 * index : 3 * index + 4]
        prompt, chosen, rejected = (self._ids[start:stop].astype(np.int64) for start, stop in pairwise(borders))
        return Pair(prompt, chosen, rejected)

    def num_tokens(self, index: int) -> int:
        """Tokens that pass through the model for one pair: the prompt twice, each answer once."""
        start, chosen, _, stop = self._offsets[3 * index : 3 * index + 4]
        return int(stop - start + chosen - start)

    def text(self, index: int) -> PairText:
        """What the ids of a pair were made from."""
        start, stop = int(self._lines[index]), int(self._lines[index + 1])
        with (self.directory / f"{self.split}.jsonl").open("rb") as file:
            file.seek(start)
            return PairText(**json.loads(file.read(stop - start)))

    def is_desirable(self, index: int) -> bool | None:
        """Whether the answer of a vote was found good; None where there are pairs."""
        return None if self._is_desirable is None else bool(self._is_desirable[index])

    def longer_is_chosen_accuracy(self) -> float:
        """Share of pairs that "the answer with more characters is better" gets right, equal lengths counted half; of
        votes, what "an answer is good if it has more characters than the median" does.

        A model below this has learnt nothing but length.
        """
        with (self.directory / f"{self.split}.jsonl").open("rb") as file:
            lengths = np.array([[len(text["chosen"]), len(text["rejected"])] for text in map(json.loads, file)])
        if self._is_desirable is None:
            sign = np.sign(lengths[:, 0] - lengths[:, 1])
        else:
            sign = np.sign(lengths[:, 0] - np.median(lengths[:, 0])) * np.where(self._is_desirable, 1, -1)
        return float((sign + 1).mean() / 2)
