"""What the HTTP server's process and the engine's process tell each other."""

from dataclasses import dataclass

from llmtrain.serving.jobs import Job, Piece


@dataclass(frozen=True)
class Add:
    """New jobs of one request; job `i` has the key `key_of(uid, i)`."""

    jobs: tuple[Job, ...]


@dataclass(frozen=True)
class Cancel:
    """The request is no longer wanted: neither what waits nor what is under way."""

    num_jobs: int


@dataclass(frozen=True)
class Stop:
    """End the process."""


@dataclass(frozen=True)
class Ready:
    """The model is loaded."""

    vocab_size: int
    context_tokens: int


@dataclass(frozen=True)
class NotReady:
    """The model cannot be served; the process ends."""

    message: str
    exit_code: int
    """Of the error of `llmtrain.errors` that says so."""


@dataclass(frozen=True)
class Failure:
    """A job's end that is no answer."""

    key: str
    message: str
    status: int
    """HTTP's."""
    code: str | int | None


@dataclass(frozen=True)
class Step:
    """One step of the engine, or a second without work."""

    started: tuple[tuple[str, float], ...]
    """Keys of jobs that left the queue, each with the time (`time.monotonic`, which both processes share on Linux)."""
    pieces: tuple[Piece, ...]
    failures: tuple[Failure, ...]
    tokens_computed: int
    """Since the start: of prompts fed and of answers. Progress is that it grows."""


FromEngine = Ready | NotReady | Step
ToEngine = Add | Cancel | Stop


def key_of(uid: str, index: int) -> str:
    """Of a request's job; `split` undoes it."""
    return f"{uid}/{index}"


def split(key: str) -> tuple[str, int]:
    uid, _, index = key.rpartition("/")
    return uid, int(index)
