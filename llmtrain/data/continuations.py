"""Preference pairs made of text: a passage's true continuation against another document's text of equal length."""

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass

from llmtrain.data.input_files import Refused
from llmtrain.data.preferences import PairText
from llmtrain.errors import DataError

WORD_START = re.compile(r"(?<!\S)\S")
WORD_END = re.compile(r"(?<=\S)\s")
ATTEMPTS = 100


@dataclass(frozen=True)
class Passage:
    """A document of one split."""

    name: str
    text: str


def continuation_pairs(
    split: str, documents: list[Passage], prompt_characters: int, answer_characters: int, seed: int
) -> Iterator[PairText | Refused]:
    """The pairs of one split's documents, in their order.

    A document is cut into windows that do not overlap. Each begins at a word, has a prompt of at most
    `prompt_characters` that ends with a word, and then exactly `answer_characters` of chosen answer, which so begins
    with white space. The rejected answer is as long, begins at a word's end too, and stands in another document of the
    split; which one and where follows from a hash of seed, prompt and answer. Raises DataError where fewer than two
    documents are long enough, or where no window fits (text without spaces has none).
    """
    lenders = [
        document.text for document in documents if _answer_start(document.text, 0, answer_characters) is not None
    ]
    if len(lenders) < 2:
        raise DataError(
            f"continuations need two documents with more than {answer_characters} characters in each split; "
            f"{split} has {len(lenders)}; add documents or lower data.pairs.answer_characters"
        )
    num_windows = 0
    for document in documents:
        for prompt, chosen in windows(document.text, prompt_characters, answer_characters):
            num_windows += 1
            rejected = _other_passage(f"{seed} {prompt} {chosen}", chosen, document.text, lenders)
            if rejected is None:
                yield Refused(document.name, "found no other text of equal length")
            else:
                yield PairText(prompt, chosen, rejected, document.name)
    if not num_windows:
        raise DataError(
            f"no document of the split {split} holds {prompt_characters} + {answer_characters} characters of prompt "
            f"and answer with a space between; lower data.pairs.prompt_characters and data.pairs.answer_characters"
        )


def sample(pairs: list[PairText], most: int, seed: int) -> list[PairText]:
    """`most` of the pairs, chosen by hash, in their order: spread over the documents, and the same for equal pairs."""

    def rank(pair: PairText) -> bytes:
        return hashlib.sha256(f"{seed} {pair.prompt} {pair.chosen}".encode()).digest()

    kept = set(map(rank, sorted(pairs, key=rank)[:most]))
    return [pair for pair in pairs if rank(pair) in kept]


def windows(text: str, prompt_characters: int, answer_characters: int) -> Iterator[tuple[str, str]]:
    """Prompts and their true continuations, which do not overlap."""
    position = 0
    while word := WORD_START.search(text, position):
        start = word.start()
        latest = start + prompt_characters
        word_ends = [match.start() for match in WORD_END.finditer(text, start, latest + 1)]
        if not word_ends:  # a word longer than the prompt, or the text's last
            position = latest
            continue
        position = word_ends[-1] + answer_characters
        if position > len(text):
            return
        if text[word_ends[-1] : position].strip():
            yield text[start : word_ends[-1]], text[word_ends[-1] : position]


def _other_passage(key: str, chosen: str, own: str, lenders: list[str]) -> str | None:
    for attempt in range(ATTEMPTS):
        digest = hashlib.sha256(f"{attempt} {key}".encode()).digest()
        lender = lenders[int.from_bytes(digest[:8], "big") % len(lenders)]
        if lender is own:
            continue
        place = int.from_bytes(digest[8:16], "big") % (len(lender) - len(chosen))
        start = _answer_start(lender, place, len(chosen))
        if start is None:
            start = _answer_start(lender, 0, len(chosen))
        assert start is not None, "every lender has room for an answer"
        rejected = lender[start : start + len(chosen)]
        if rejected.strip() and rejected != chosen:
            return rejected
    return None


def _answer_start(text: str, place: int, answer_characters: int) -> int | None:
    """The first word's end from `place` on that has an answer's length of text behind it."""
    word_end = WORD_END.search(text, place, max(0, len(text) - answer_characters + 1))
    return word_end.start() if word_end else None
