"""Where the time of a process goes."""

import time
from collections.abc import Iterator
from contextlib import contextmanager


class Stopwatch:
    """Seconds by phase. A phase inside another is not counted to the outer one, so that the phases add up."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}
        self._open: list[str] = []
        self._since = time.monotonic()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        self._count()
        self._open.append(name)
        try:
            yield
        finally:
            self._count()
            self._open.pop()

    @property
    def seconds(self) -> dict[str, float]:
        """Up to now, in the order in which the phases first ended or were interrupted by another."""
        self._count()
        return dict(self._seconds)

    def _count(self) -> None:
        now = time.monotonic()
        if self._open:
            self._seconds[self._open[-1]] = self._seconds.get(self._open[-1], 0.0) + max(0.0, now - self._since)
        self._since = now
