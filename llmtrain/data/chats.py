"""Chats on disk, read by memory map.

train.chats.uint16      the ids of each chat one after the other; the suffix is the type
train.targets.bits      one bit a token, the first of a byte highest: is it a target
train.offsets.npy       [chats + 1] where each chat begins, and where the last one ends
train.num_targets.npy   [chats] targets of each
train.jsonl             the text of each chat, a line each
train.lines.npy         [chats + 1] the byte at which each line begins, and where the last one ends
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from llmtrain.artifacts import SplitCounts
from llmtrain.data.chat_template import ChatTemplate, Rendered
from llmtrain.data.text import Ids, memory_map
from llmtrain.data.tokenizer import encode_with_offsets

Bits = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class ChatText:
    """A chat as the template wrote it."""

    text: str
    where: str
    """file:line, or the name of what it was made from."""


@dataclass(frozen=True)
class Chat:
    """The tokens of a chat."""

    ids: npt.NDArray[np.int64]
    """[tokens]"""
    is_target: Bits
    """[tokens]: is this token learnt, given all before it. Never the first: nothing predicts it."""


def chat_ids(template: ChatTemplate, chats: Sequence[Rendered]) -> list[Chat]:
    """The tokens of whole rendered chats.

    A token is a target where it stands for any character of a learnt span, as in transformers' assistant masks: one
    that reaches over the border belongs to the assistant.
    """
    found = []
    encoded = encode_with_offsets(template.tokenizer, [chat.text for chat in chats])
    for chat, (ids, offsets) in zip(chats, encoded, strict=True):
        starts, stops = np.array(offsets, dtype=np.int64).reshape(-1, 2).T
        is_target = np.zeros(len(ids), dtype=np.bool_)
        for start, stop in chat.spans:
            is_target |= (starts < stop) & (stops > start)
        is_target[:1] = False
        found.append(Chat(np.array(ids, dtype=np.int64), is_target))
    return found


class ChatWriter:
    """Writes one split; `close` completes it and counts."""

    def __init__(self, directory: Path, split: str, dtype: np.dtype[Any]) -> None:
        self.directory, self.split, self.dtype = directory, split, dtype
        self.offsets, self.lines, self.num_targets = [0], [0], list[int]()
        self.num_bytes = 0
        self.ids_file = (directory / f"{split}.chats.{dtype.name}").open("wb")
        self.bits_file = (directory / f"{split}.targets.bits").open("wb")
        self.text_file = (directory / f"{split}.jsonl").open("wb")
        self.bits_of_a_byte = np.zeros(0, dtype=np.bool_)

    def append(self, chat: Chat, text: ChatText) -> None:
        self.offsets.append(self.offsets[-1] + len(chat.ids))
        self.num_targets.append(int(chat.is_target.sum()))
        self.ids_file.write(np.asarray(chat.ids, dtype=self.dtype).tobytes())
        bits = np.concatenate([self.bits_of_a_byte, chat.is_target])
        whole = len(bits) // 8 * 8
        self.bits_file.write(np.packbits(bits[:whole]).tobytes())
        self.bits_of_a_byte = bits[whole:]
        self.num_bytes += len(text.text.encode())
        line = json.dumps(asdict(text), ensure_ascii=False).encode() + b"\n"
        self.lines.append(self.lines[-1] + len(line))
        self.text_file.write(line)

    def close(self) -> SplitCounts:
        self.bits_file.write(np.packbits(self.bits_of_a_byte).tobytes())
        for file in (self.ids_file, self.bits_file, self.text_file):
            file.close()
        for name in ("offsets", "lines", "num_targets"):
            np.save(self.directory / f"{self.split}.{name}.npy", np.array(getattr(self, name), dtype=np.int64))
        return SplitCounts(num_documents=len(self.lines) - 1, num_tokens=self.offsets[-1], num_bytes=self.num_bytes)


class ChatRows:
    """One split of prepared chats."""

    def __init__(self, directory: Path, split: str) -> None:
        self.directory, self.split = directory, split
        (path,) = directory.glob(f"{split}.chats.uint*")
        self._ids = memory_map(path)
        self._bits = np.memmap(directory / f"{split}.targets.bits", dtype=np.uint8, mode="r")
        self._offsets: npt.NDArray[np.int64] = np.load(directory / f"{split}.offsets.npy", mmap_mode="r")
        self._num_targets: npt.NDArray[np.int64] = np.load(directory / f"{split}.num_targets.npy", mmap_mode="r")
        self._lines: npt.NDArray[np.int64] = np.load(directory / f"{split}.lines.npy", mmap_mode="r")

    def __reduce__(self) -> tuple[Any, ...]:
        return ChatRows, (self.directory, self.split)  # a worker process maps the files itself

    def __len__(self) -> int:
        return len(self._num_targets)

    def __getitem__(self, index: int) -> Chat:
        """Raises IndexError past the end, so that `for chat in rows` ends."""
        if not 0 <= index < len(self):
            raise IndexError(f"chat {index} of {len(self)}")
        start, stop = int(self._offsets[index]), int(self._offsets[index + 1])
        first_byte = start // 8
        bits = np.unpackbits(self._bits[first_byte : -(-stop // 8)])[start - 8 * first_byte : stop - 8 * first_byte]
        return Chat(self._ids[start:stop].astype(np.int64), bits.astype(np.bool_))

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        """[chats] tokens of each: what they are packed by."""
        return np.diff(self._offsets)

    def num_tokens(self, index: int) -> int:
        """Tokens of a chat, targets or not."""
        return int(self._offsets[index + 1] - self._offsets[index])

    def num_targets(self, index: int) -> int:
        """Targets of a chat: what its loss is normalised by."""
        return int(self._num_targets[index])

    def text(self, index: int) -> ChatText:
        """What the ids of a chat were made from."""
        start, stop = int(self._lines[index]), int(self._lines[index + 1])
        with (self.directory / f"{self.split}.jsonl").open("rb") as file:
            file.seek(start)
            return ChatText(**json.loads(file.read(stop - start)))

    def prompt_ids(self, index: int) -> Ids:
        """[tokens] before the first learnt answer, the generation prompt included."""
        chat = self[index]
        return chat.ids[: int(chat.is_target.argmax())]
