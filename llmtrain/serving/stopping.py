"""Text of tokens as they come: no broken characters, nothing after a stop text, at a constant cost a token."""

from collections.abc import Sequence
from typing import Any, Protocol

UNKNOWN = "\N{REPLACEMENT CHARACTER}"
LONGEST_WINDOW = 16
"""Tokens after which a window of undecodable bytes is cut."""
LONGEST_TAIL = 3
"""Most tokens that a character of 4 bytes may still lack one of."""


class Tokenizer(Protocol):
    """What is asked of a tokenizer of transformers."""

    def decode(self, token_ids: Any, **how: Any) -> Any: ...


class Detokeniser:
    """Text piece by piece; the pieces make the text of all tokens, special ones left out.

    Only tokens since the last but one whole character are decoded again: what a token means may depend on the one
    before it. Bytes that are no character yet show as one U+FFFD at the end, which is held back; any other one stays.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._window: list[int] = []
        self._whole = 0
        """Tokens of the window at whose end the text was whole: where the next window begins."""
        self._shown = 0
        """Characters of the window's text that were given."""

    def push(self, token: int) -> str:
        """What `token` makes certain."""
        self._window.append(token)
        text = self._decode(self._window)
        certain = text.removesuffix(UNKNOWN)
        new = certain[self._shown :]
        if certain == text:
            self._begin_at(self._whole)
        else:
            self._shown = max(self._shown, len(certain))
            if len(self._window) > LONGEST_WINDOW:
                self._cut(text)
        return new

    def flush(self) -> str:
        """What was held back, at the end."""
        rest = self._decode(self._window)[self._shown :]
        self._shown += len(rest)
        return rest

    def _begin_at(self, start: int) -> None:
        """The window from `start` on, all of it given."""
        self._window = self._window[start:]
        self._whole = len(self._window)
        self._shown = len(self._decode(self._window))

    def _cut(self, text: str) -> None:
        """Leave out what is certainly junk: the bytes before a place where decoding apart gives the same."""
        for length in range(1, LONGEST_TAIL + 1):
            head, tail = self._decode(self._window[:-length]), self._decode(self._window[-length:])
            if head + tail == text:
                self._shown = max(0, self._shown - len(head))
                self._window, self._whole = self._window[-length:], 0
                return

    def _decode(self, ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))


class StopTexts:
    """Ends a text before the stop text that is complete first, of those that end together before the longest one."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self.found = False

    def push(self, text: str) -> str:
        """What can be shown: all but what may become a stop text. Nothing more once `found`."""
        if self.found or not text:
            return ""
        if not self._stops:
            return text
        held = self._held + text
        ends = [(at + len(stop), at) for stop in self._stops if (at := held.find(stop)) >= 0]
        if ends:
            self.found, self._held = True, ""
            return held[: min(ends)[1]]
        kept = max(_overlap(held, stop) for stop in self._stops)
        self._held = held[len(held) - kept :]
        return held[: len(held) - kept]

    def flush(self) -> str:
        """What was held back, at an end that is no stop text."""
        rest, self._held = self._held, ""
        return rest


def _overlap(text: str, stop: str) -> int:
    """The most characters at the end of `text` with which `stop` begins."""
    return next((size for size in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:size])), 0)
