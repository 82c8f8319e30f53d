"""One line that says how far a run is: rewritten in place on a terminal, a plain line now and then elsewhere."""

import shutil
import sys
import time
from collections import deque
from typing import TextIO

WINDOW_SECONDS = 30.0
"""Span over which the speed is measured: longer than an evaluation's pause, short enough to follow a change."""
TERMINAL_SECONDS = 0.2
"""Least time between two lines on a terminal."""
PLAIN_SECONDS = 10.0
"""Least time between two lines elsewhere, such as in a log file."""


class Progress:
    """The progress of `total_tokens` tokens, written to `stream` (standard error where none is given)."""

    def __init__(self, total_tokens: int, label: str, stream: TextIO | None = None) -> None:
        self.total_tokens = total_tokens
        self.label = label
        self.stream = stream or sys.stderr
        self.on_terminal = self.stream.isatty()
        self._points: deque[tuple[float, int]] = deque()
        self._last_shown = float("-inf")
        self._line = ""
        self._width_shown = 0

    def update(self, tokens: int, **shown: float) -> None:
        """Say that `tokens` (since the start of the run) are done; `shown` are figures such as the loss."""
        now = time.monotonic()
        if self._points and now < self._points[-1][0]:  # a suspended or moved machine
            self._points.clear()
            self._last_shown = float("-inf")
        self._points.append((now, tokens))
        while now - self._points[0][0] > WINDOW_SECONDS and len(self._points) > 2:
            self._points.popleft()
        self._line = self._compose(tokens, shown)
        if now - self._last_shown >= (TERMINAL_SECONDS if self.on_terminal else PLAIN_SECONDS):
            self._show()
            self._last_shown = now

    def done(self) -> None:
        """Show the last state, whenever it was, and end the line."""
        if not self._line:
            return
        self._show()
        if self.on_terminal:
            self.stream.write("\n")
            self.stream.flush()
        self._line = ""

    def tokens_per_second(self) -> float:
        """Over the last `WINDOW_SECONDS`; 0 until two updates were made."""
        if len(self._points) < 2:
            return 0.0
        (start, tokens_before), (now, tokens) = self._points[0], self._points[-1]
        return (tokens - tokens_before) / (now - start) if now > start else 0.0

    def _compose(self, tokens: int, shown: dict[str, float]) -> str:
        share = tokens / self.total_tokens
        speed = self.tokens_per_second()
        left = _duration((self.total_tokens - tokens) / speed) if speed > 0 else "?"
        figures = "".join(f"  {name} {value:.4g}" for name, value in shown.items())
        return (
            f"{self.label} {_bar(share) if self.on_terminal else ''}{share:4.0%}  "
            f"{_short(tokens)}/{_short(self.total_tokens)} tokens  {_short(speed)} tokens/s  {left} left{figures}"
        )

    def _show(self) -> None:
        if not self.on_terminal:
            self.stream.write(self._line + "\n")
        else:
            line = self._line[: shutil.get_terminal_size().columns - 1]
            self.stream.write("\r" + line.ljust(self._width_shown))  # spaces wipe what a longer line left
            self._width_shown = len(line)
        self.stream.flush()


def _bar(share: float, width: int = 12) -> str:
    filled = min(width, int(share * width))
    return "█" * filled + "░" * (width - filled) + " "


def _short(count: float) -> str:
    """1234567 -> 1.23M."""
    for limit, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if count >= limit:
            return f"{count / limit:.3g}{unit}"
    return f"{count:.3g}"


def _duration(seconds: float) -> str:
    """3725 -> 1:02:05; 65 -> 1:05."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
