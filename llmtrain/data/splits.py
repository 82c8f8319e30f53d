"""Which document is trained on and which is held out."""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from fractions import Fraction
from math import floor
from pathlib import Path

from llmtrain.config.data import TextData
from llmtrain.data.corpus import Document, read_corpus
from llmtrain.data.input_files import Refused
from llmtrain.data.refusals import check_refused_share
from llmtrain.errors import DataError

SPLITS = ("train", "validation", "test")


def text_digest(text: str) -> bytes:
    """SHA-256 of the text's UTF-8 bytes."""
    return hashlib.sha256(text.encode()).digest()


def split_of(text: str, seed: int, validation_share: float, test_share: float) -> str:
    """The split of a text: a pure function of its arguments, so order and neighbours never matter."""
    digest = hashlib.sha256(f"{seed} ".encode() + text_digest(text)).digest()
    share = int.from_bytes(digest[:8], "big") / 2**64
    if share < test_share:
        return "test"
    return "validation" if share < test_share + validation_share else "train"


class SplitCorpus:
    """One pass over a corpus as (split, document), exact duplicates left out.

    Documents are split whole, by the hash of their text. Where that would leave a split empty, because there are few of
    them, each one is cut by position instead: its beginning is for training, its end for the test. Borders
    are rounded down.

    Iterate once. Raises DataError for too many refused records (`report` then has them all), for a corpus without text,
    and for one too short to fill every split.
    """

    def __init__(self, data: TextData, report: Path, say: Callable[[str], None]) -> None:
        self.data, self.report, self.say = data, report, say
        self.refused: list[Refused] = []
        self.num_duplicates = 0

    def __iter__(self) -> Iterator[tuple[str, Document]]:
        by_position = not self._fills_every_split()
        num_in_split = dict.fromkeys(SPLITS, 0)
        documents, parts = set[bytes](), set[bytes]()
        for document in self._documents():
            if not _add(text_digest(document.text), documents):
                self.num_duplicates += 1
                continue
            for split, part in self._parts(document) if by_position else [(self._split_of(document), document)]:
                if not by_position or _add(text_digest(part.text), parts):
                    num_in_split[split] += 1
                    yield split, part
        num_kept = sum(num_in_split.values())
        num_records = len(documents) + self.num_duplicates + len(self.refused)
        check_refused_share(self.refused, num_records, self.data.max_refused_share, self.report)
        if not num_kept:
            raise DataError("data.corpus has no text at all; name files that have some")
        if empty := [split for split, number in num_in_split.items() if not number]:
            raise DataError(
                f"data.corpus is too short: {num_kept} documents or parts of them leave nothing for "
                f"{' and '.join(empty)}; add text, or raise data.validation_share and data.test_share"
            )
        if by_position:
            self.say(
                "too few documents to hold out whole ones: each is cut by position, its beginning for training, the "
                f"next {self.data.validation_share:.0%} for validation, the last {self.data.test_share:.0%} for test"
            )

    def _documents(self) -> Iterator[Document]:
        for record in read_corpus(self.data.corpus):
            if isinstance(record, Refused):
                self.refused.append(record)
            else:
                yield record

    def _fills_every_split(self) -> bool:
        """Reads only until each split has a document."""
        missing = set(SPLITS)
        for record in read_corpus(self.data.corpus):
            if isinstance(record, Document):
                missing.discard(self._split_of(record))
                if not missing:
                    return True
        return False

    def _split_of(self, document: Document) -> str:
        return split_of(document.text, self.data.split_seed, self.data.validation_share, self.data.test_share)

    def _parts(self, document: Document) -> Iterator[tuple[str, Document]]:
        length = len(document.text)
        shares = (self.data.validation_share, self.data.test_share)
        validation, test = (Fraction(str(share)) for share in shares)  # exact: in binary, 1 - 0.05 - 0.05 is below 0.9
        borders = (0, floor(length * (1 - test - validation)), floor(length * (1 - test)), length)
        for split, start, end in zip(SPLITS, borders, borders[1:], strict=False):
            if document.text[start:end].strip():
                yield split, replace(document, name=f"{document.name}[{start}:{end}]", text=document.text[start:end])


def _add(digest: bytes, seen: set[bytes]) -> bool:
    """Whether it was new."""
    size = len(seen)
    seen.add(digest)
    return len(seen) > size
