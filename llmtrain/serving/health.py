"""Whether an engine makes progress: more than that its process is there, or that a socket listens."""

import time
from dataclasses import dataclass, field

MOST_FAILURES = 3
"""Requests in a row that the engine may fail before it counts as broken: a GPU that is lost fails each of them."""


@dataclass
class Health:
    """What was heard of the engine's process; times are those of `time.monotonic`."""

    last_heard: float = field(default_factory=time.monotonic)
    """An engine without work is heard each second."""
    last_progress: float = field(default_factory=time.monotonic)
    """When a token was computed, of a prompt or of an answer; or when work came to an idle engine."""
    tokens_computed: int = 0
    tokens_generated: int = 0
    num_failures: int = 0
    """Requests that failed in the engine since it last gave a token."""
    ended: str | None = None
    """How the engine's process ended."""

    def work_came(self) -> None:
        """To an engine that had none."""
        self.last_progress = time.monotonic()

    def heard(self, now: float, tokens_computed: int) -> None:
        self.last_heard = now
        if tokens_computed > self.tokens_computed:
            self.tokens_computed, self.last_progress = tokens_computed, now

    def generated(self, num_tokens: int) -> None:
        self.tokens_generated += num_tokens
        self.num_failures = 0

    def fault(self, now: float, *, has_work: bool, progress_seconds: float) -> str | None:
        """Why no answer is to be expected; None where nothing speaks against it."""
        if self.ended is not None:
            return self.ended
        if self.num_failures >= MOST_FAILURES:
            return f"the engine failed the last {self.num_failures} requests"
        silence, standstill = now - self.last_heard, now - self.last_progress
        if has_work and standstill > progress_seconds:
            return f"no token was computed for {standstill:.0f} s, and requests wait for it"
        if not has_work and silence > progress_seconds:
            return f"nothing was heard of the engine for {silence:.0f} s"
        return None
