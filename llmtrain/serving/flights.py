"""Requests under way, as the HTTP server's process knows them: who waits, who runs, and whether there is progress."""

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http import HTTPStatus

from llmtrain.errors import EngineFailed, UserError
from llmtrain.serving.health import Health
from llmtrain.serving.http_errors import Refused
from llmtrain.serving.jobs import Job, Piece
from llmtrain.serving.messages import Add, Cancel, Failure, NotReady, Ready, Step, ToEngine, split
from llmtrain.serving.metrics import Metrics

RETRY_AFTER_S = 1


@dataclass(eq=False)
class Flight:
    """One request's jobs."""

    jobs: tuple[Job, ...]
    uid: str = field(default_factory=lambda: uuid.uuid4().hex)
    began: float = field(default_factory=time.monotonic)
    num_waiting: int = 0
    """Jobs that have no place yet."""
    num_left: int = 0
    """Jobs that have not ended."""
    last_token_at: dict[int, float] = field(default_factory=dict)
    """By job."""
    news: "asyncio.Queue[tuple[int, Piece] | Refused]" = field(default_factory=asyncio.Queue)

    def __post_init__(self) -> None:
        self.num_waiting = self.num_left = len(self.jobs)

    @property
    def num_running(self) -> int:
        return self.num_left - self.num_waiting

    async def pieces(self) -> AsyncIterator[tuple[int, Piece]]:
        """The number of a job and what is new of it, until all have ended. Raises Refused where the engine fails."""
        num_left = len(self.jobs)
        while num_left:
            new = await self.news.get()
            if isinstance(new, Refused):
                raise new
            num_left -= new[1].finish_reason is not None
            yield new


class Flights:
    """All requests under way. `send` puts a message into the engine's queue and never waits."""

    def __init__(self, send: Callable[[str, ToEngine], None], max_sequences: int, max_waiting: int) -> None:
        self._send, self._max_sequences, self._max_waiting = send, max_sequences, max_waiting
        self._by_uid: dict[str, Flight] = {}
        self.refuses: str | None = "the model is being loaded"
        """Why no requests are taken; None where they are."""
        self.ready: asyncio.Future[Ready] = asyncio.get_running_loop().create_future()
        """Raises UserError or EngineFailed where the model cannot be served."""
        self.metrics = Metrics(lambda: self.num_running, lambda: self.num_waiting)
        self.health = Health()

    @contextmanager
    def flight(self, jobs: tuple[Job, ...]) -> Iterator[Flight]:
        """Give jobs to the engine for the block; what is not finished at its end is cancelled.

        Raises Refused: 503 where no requests are taken, 429 where too many wait.
        """
        self.check_open()
        if self._num_places <= 0 and self.num_waiting >= self._max_waiting:
            message = f"{self.num_waiting} requests wait already; try again in a moment"
            raise Refused(HTTPStatus.TOO_MANY_REQUESTS, message, code="queue_full", retry_after_s=RETRY_AFTER_S)
        flight = Flight(jobs)
        if not self.has_work:
            self.health.work_came()
        self._by_uid[flight.uid] = flight
        self._send(flight.uid, Add(jobs))
        try:
            yield flight
        finally:
            del self._by_uid[flight.uid]
            if flight.num_left:
                self._send(flight.uid, Cancel(len(jobs)))

    def check_open(self) -> None:
        """Raises Refused with 503 where no requests are taken."""
        if self.refuses is not None:
            raise unavailable(self.refuses)

    def open(self) -> None:
        """Take requests, from now on."""
        self.refuses = None

    def close(self, reason: str) -> None:
        """Take no new requests."""
        self.refuses = reason

    def end_all(self, reason: str) -> None:
        """End what is under way with an error."""
        self.close(reason)
        for flight in self._by_uid.values():
            flight.news.put_nowait(unavailable(reason))

    def take(self, message: Ready | NotReady | Step) -> None:
        """Hear the engine."""
        now = time.monotonic()
        match message:
            case Ready():
                self.health.heard(now, 0)
                self.ready.set_result(message)
            case NotReady(text, exit_code):
                error = UserError(text) if exit_code == UserError.exit_code else EngineFailed(text)
                self.ready.set_exception(error)
            case Step():
                self._step(message, now)

    def _step(self, message: Step, now: float) -> None:
        self.health.heard(now, message.tokens_computed)
        for key, started_at in message.started:
            self._started(key, started_at)
        for piece in message.pieces:
            self._piece(piece, now)
        for failure in message.failures:
            self._failure(failure)

    @property
    def under_way(self) -> int:
        return len(self._by_uid)

    @property
    def has_work(self) -> bool:
        """Whether the engine has: an answer may still be on its way to the client when the engine is done."""
        return any(flight.num_left for flight in self._by_uid.values())

    @property
    def num_running(self) -> int:
        """Requests that have a place for one of their sequences at least."""
        return sum(flight.num_running > 0 for flight in self._by_uid.values())

    @property
    def num_waiting(self) -> int:
        """Requests that have no place and will get none at once: the engine takes sequences in the order they came."""
        places = self._max_sequences - sum(flight.num_running for flight in self._by_uid.values())
        waiting = 0
        for flight in self._by_uid.values():
            waiting += places <= 0 and flight.num_waiting == len(flight.jobs)
            places -= flight.num_waiting
        return waiting

    @property
    def _num_places(self) -> int:
        """Places that no sequence has or will get."""
        return self._max_sequences - sum(flight.num_left for flight in self._by_uid.values())

    def _started(self, key: str, started_at: float) -> None:
        uid, _ = split(key)
        if flight := self._by_uid.get(uid):
            if flight.num_waiting == len(flight.jobs):
                self.metrics.queue_time.observe(started_at - flight.began)
            flight.num_waiting -= 1

    def _piece(self, piece: Piece, now: float) -> None:
        uid, index = split(piece.key)
        self.metrics.generation_tokens.inc(len(piece.token_ids))
        self.health.generated(len(piece.token_ids))
        flight = self._by_uid.get(uid)
        if flight is None:  # its client went away a moment ago
            return
        if piece.token_ids:
            self._time(flight, index, len(piece.token_ids), now)
        if piece.finish_reason is not None:
            flight.num_left -= 1
            if not flight.num_left:
                self.metrics.request_time.observe(now - flight.began)
        flight.news.put_nowait((index, piece))

    def _time(self, flight: Flight, index: int, num_tokens: int, now: float) -> None:
        before = flight.last_token_at.get(index)
        if before is not None:
            for _ in range(num_tokens):
                self.metrics.token_time.observe((now - before) / num_tokens)
        else:
            if not flight.last_token_at:
                self.metrics.first_token.observe(now - flight.began)
            self.metrics.prompt_tokens.inc(len(flight.jobs[index].ids))
        flight.last_token_at[index] = now

    def _failure(self, failure: Failure) -> None:
        uid, _ = split(failure.key)
        if failure.status >= HTTPStatus.INTERNAL_SERVER_ERROR:
            self.health.num_failures += 1
        if flight := self._by_uid.get(uid):
            flight.num_left -= 1
            self.metrics.failed.inc()
            code = None if failure.code is None else str(failure.code)
            flight.news.put_nowait(Refused(HTTPStatus(failure.status), failure.message, code=code))


def unavailable(reason: str) -> Refused:
    return Refused(HTTPStatus.SERVICE_UNAVAILABLE, reason, code="unavailable", retry_after_s=RETRY_AFTER_S)
