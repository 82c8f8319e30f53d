"""Text that forms of a model are compared on, and text that rounding looks at: never the same."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmtrain.config.optimise import Optimising
from llmtrain.data import python_docs
from llmtrain.errors import DataError

Ids = tuple[int, ...]


@dataclass(frozen=True)
class Pieces:
    """Token ids of pieces of text, all of one length."""

    compared: tuple[Ids, ...]
    others: tuple[Ids, ...]
    """Of other texts."""


def pieces(config: Optimising, tokenizer: Any, context_tokens: int, num_others: int) -> Pieces:
    """`config.documents` pieces to compare forms on and at most `num_others` others, taken evenly from all.

    Every second text is for comparing; a single text is cut in two. Raises DataError where there is too little.
    """
    texts = [_read(path) for path in config.text_paths] or list(python_docs.topics().values())
    if len(texts) == 1:
        half = len(texts[0]) // 2
        texts = [texts[0][:half], texts[0][half:]]
    length = min(config.document_tokens, context_tokens)
    cut = [_cut(tokenizer(text, verbose=False).input_ids, length) for text in texts]
    compared = [piece for found in cut[::2] for piece in found]
    others = [piece for found in cut[1::2] for piece in found]
    if len(compared) < config.documents or not others:
        raise DataError(
            f"the text holds {len(compared)} pieces of {length} tokens to compare forms on, and {config.documents} are "
            f"asked for: name more files in optimise.text_paths, or set optimise.documents={max(2, len(compared))}"
        )
    return Pieces(tuple(_evenly(compared, config.documents)), tuple(_evenly(others, num_others)))


def _read(path: str) -> str:
    try:
        return Path(path).expanduser().read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"optimise.text_paths: {path} cannot be read as UTF-8 text: {error}") from error


def _cut(ids: Sequence[int], length: int) -> list[Ids]:
    """Whole pieces one after the other; what is left over at the end is dropped."""
    return [tuple(ids[start : start + length]) for start in range(0, len(ids) - length + 1, length)]


def _evenly(found: Sequence[Ids], number: int) -> Sequence[Ids]:
    number = min(number, len(found))
    return [found[index * len(found) // number] for index in range(number)]
