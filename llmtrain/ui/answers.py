"""Questions to one model or to several at the same time, and their answers as they are written. Knows no page."""

import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from queue import SimpleQueue
from typing import Any, Literal

from pydantic import TypeAdapter, ValidationError

from llmtrain.client.client import Client, Sampling
from llmtrain.errors import EngineUnavailable, LLMTrainError, UserError

SETTINGS = ("max_tokens", "temperature", "top_p", "top_k", "seed")
"""Fields of `Sampling` that a person sets."""


@dataclass(frozen=True)
class Choice:
    """A model of an endpoint."""

    url: str
    model: str
    api_key_env: str | None = None

    @property
    def name(self) -> str:
        """What the page lists, and by which it finds the choice again."""
        return f"{self.model} at {self.url.partition('://')[2]}"


def choices(urls: Sequence[str], api_key_env: str | None = None) -> tuple[Choice, ...]:
    """Every model that the endpoints list, in their order.

    Raises RequestRefused, EngineFailed and EngineUnavailable, the last also for an endpoint that lists none.
    """
    found = []
    for url in dict.fromkeys(url.rstrip("/").removesuffix("/v1") for url in urls):
        with Client(url, api_key_env=api_key_env, timeout_s=10.0) as client:
            cards = client.models()
        if not cards:
            raise EngineUnavailable(f"{url} serves no model yet; ask again when it does")
        found += [Choice(url, card.id, api_key_env) for card in cards]
    return tuple(found)


def sampling(texts: Sequence[str]) -> Sampling:
    """What stands in the fields of SETTINGS; an empty one is left to the engine.

    Raises UserError for what is no number. What is out of range is refused when it is sent.
    """
    given = {name: text.strip() for name, text in zip(SETTINGS, texts, strict=True) if text.strip()}
    try:
        return TypeAdapter(Sampling).validate_python(given)
    except ValidationError as error:
        wrong = {str(one["loc"][0]): "a whole number" if "int" in one["type"] else "a number" for one in error.errors()}
        raise UserError(
            "; ".join(f"{name}: got '{given[name]}', wants {kind}" for name, kind in wrong.items())
        ) from error


@dataclass(frozen=True)
class Turn:
    """A question and what has come of its answer."""

    question: str
    answer: str = ""
    end: Literal["writing", "whole", "length", "stopped", "failed"] = "writing"
    """`length`: cut at max_tokens or at the context's end."""
    problem: str = ""
    """What `failed`, in the words of the error."""

    @property
    def note(self) -> str:
        """What a reader must know of an answer that is not whole; empty for one that is, or may become so."""
        kept = "Not whole" if self.answer else "No answer"
        match self.end:
            case "length":
                return f"{kept}: max_tokens were written, or the context is full."
            case "stopped":
                return f"{kept}: stopped."
            case "failed":
                return f"{kept}: {self.problem}"
        return ""


@dataclass(frozen=True)
class Question:
    """What one model is asked."""

    choice: Choice
    before: tuple[Turn, ...]
    """The conversation up to here."""
    text: str
    system: str
    """The system message; empty: none, then the model's chat template may put its own."""
    sampling: Sampling

    def messages(self) -> list[dict[str, Any]]:
        """The conversation as the endpoint wants it.

        A question that got no answer is left out: templates want the two in turns. What came of a broken one stays.
        """
        messages = [{"role": "system", "content": self.system}] if self.system else []
        for turn in self.before:
            if turn.answer:
                messages.append({"role": "user", "content": turn.question})
                messages.append({"role": "assistant", "content": turn.answer})
        return [*messages, {"role": "user", "content": self.text}]


@dataclass(frozen=True)
class _Event:
    index: int
    """Of the question."""
    text: str = ""
    end: Literal["whole", "length", "failed"] | None = None
    problem: str = ""
    bug: BaseException | None = None


class Answers:
    """The answers that are being written; a session is one open page."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._clients: dict[str, list[Client]] = {}

    def ask(self, session: str, questions: Sequence[Question]) -> Iterator[tuple[Turn, ...]]:
        """Ask all at the same time; the turns, one for each question, now and each time that something new is there.

        The last ones are no longer `writing`. Errors of an endpoint end its own turn only. Closing the iterator, or
        `stop` in another thread, closes the connections, which ends the engines' work.
        """
        self.stop(session)
        turns = [Turn(question.text) for question in questions]
        clients = [Client(one.choice.url, one.choice.model, one.choice.api_key_env) for one in questions]
        with self._lock:
            self._clients[session] = clients
        events: SimpleQueue[_Event] = SimpleQueue()
        for index, (question, client) in enumerate(zip(questions, clients, strict=True)):
            threading.Thread(target=_read, args=(index, question, client, events), daemon=True).start()
        try:
            yield tuple(turns)
            while any(turn.end == "writing" for turn in turns):
                for event in _new(events):
                    turns[event.index] = _after(turns[event.index], event, self._stopped(session, clients))
                yield tuple(turns)
        finally:
            self._end(session, clients)

    def stop(self, session: str) -> None:
        """End what is being written for a session, if anything is."""
        with self._lock:
            clients = self._clients.pop(session, [])
        for client in clients:
            client.abort()

    def stop_all(self) -> None:
        """End what is being written."""
        for session in list(self._clients):
            self.stop(session)

    def _stopped(self, session: str, clients: list[Client]) -> bool:
        return self._clients.get(session) is not clients

    def _end(self, session: str, clients: list[Client]) -> None:
        with self._lock:
            if self._clients.get(session) is clients:
                del self._clients[session]
        for client in clients:
            client.abort()


def _read(index: int, question: Question, client: Client, events: "SimpleQueue[_Event]") -> None:
    """A thread's work: one answer, piece by piece, and how it ended."""
    reason = None
    try:
        with client:
            for written in client.stream_chat(question.messages(), question.sampling):
                reason = written.finish_reason or reason
                if written.text:
                    events.put(_Event(index, written.text))
        events.put(_Event(index, end="length" if reason == "length" else "whole"))
    except LLMTrainError as error:
        events.put(_Event(index, end="failed", problem=str(error)))
    except BaseException as bug:  # it is raised where the page waits, which would wait for ever
        events.put(_Event(index, bug=bug))


def _new(events: "SimpleQueue[_Event]") -> Iterator[_Event]:
    """Waits for one event; then those that are there already, so that a fast engine does not flood the page."""
    yield events.get()
    for _ in range(events.qsize()):
        yield events.get()


def _after(turn: Turn, event: _Event, stopped: bool) -> Turn:
    if event.bug is not None:
        raise event.bug
    if event.end is None:
        return replace(turn, answer=turn.answer + event.text)
    if event.end == "failed" and stopped:
        return replace(turn, end="stopped")
    return replace(turn, end=event.end, problem=event.problem)
