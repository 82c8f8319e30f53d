"""`Client`: what an engine or the gateway answers, typed; what it refuses, as an error of `llmtrain.errors`."""

import json
import os
import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self, TypeVar
from weakref import WeakValueDictionary

import httpx
from pydantic import BaseModel, ValidationError

from llmtrain.client.protocol import (
    ChatAnswer,
    ChatRequest,
    CompletionAnswer,
    CompletionRequest,
    DetokenizeAnswer,
    DetokenizeRequest,
    ErrorBody,
    ModelCard,
    ModelList,
    Request,
    TokenizeAnswer,
    TokenizeRequest,
)
from llmtrain.errors import EngineFailed, EngineUnavailable, RequestRefused

DONE = "[DONE]"
Parsed = TypeVar("Parsed", bound=BaseModel)


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen, and when to stop; what is None is left to the engine."""

    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    seed: int | None = None
    stop: tuple[str, ...] | None = None
    ignore_eos: bool | None = None

    def fields(self) -> dict[str, Any]:
        """What is not None."""
        return {name: value for name, value in vars(self).items() if value is not None}


GREEDY = Sampling(temperature=0.0)


@dataclass(frozen=True)
class Written:
    """One answer, whole or a piece of a stream."""

    text: str
    finish_reason: str | None = None
    """`stop` or `length`; None while a stream goes on."""
    token_ids: tuple[int, ...] | None = None
    """Where they were asked for."""
    prompt_token_ids: tuple[int, ...] | None = None
    logprobs: tuple[float, ...] | None = None
    """Of each token of `text`, in nats, where they were asked for."""
    index: int = 0


@dataclass(frozen=True)
class Scores:
    """What the model thinks of a sequence, for each token but the first."""

    logprobs: tuple[float, ...]
    """Log-probability of the token given those before it, in nats."""
    top_ids: tuple[int, ...]
    """The likeliest token in its place."""


@dataclass
class Client:
    """An endpoint. `model` None means the first one that it serves. Close it, or use it as a context manager.

    All methods raise RequestRefused (the engine says 4xx), EngineUnavailable (it cannot be reached, is busy or not
    ready: 503, 429, timeouts) and EngineFailed (5xx, answers that are none, a stream that breaks off).
    """

    base_url: str
    """With scheme and port, without `/v1`: `http://127.0.0.1:8000`."""
    model: str | None = None
    api_key_env: str | None = None
    """Name of the environment variable that holds the key, if the endpoint wants one."""
    timeout_s: float = 120.0
    """Longest silence: between a request and its answer, or between two pieces of a stream."""
    _http: httpx.Client = field(init=False, repr=False)
    _connections: WeakValueDictionary[int, Any] = field(init=False, repr=False, default_factory=WeakValueDictionary)
    _aborted: bool = field(init=False, repr=False, default=False)

    def __post_init__(self) -> None:
        self.base_url = self.base_url.rstrip("/").removesuffix("/v1")
        headers = {}
        if self.api_key_env is not None:
            headers["Authorization"] = f"Bearer {os.environ.get(self.api_key_env, '')}"
        self._http = httpx.Client(
            base_url=self.base_url,
            headers=headers,
            timeout=httpx.Timeout(self.timeout_s, connect=5.0),
            event_hooks={"request": [lambda request: request.extensions.update(trace=self._trace)]},
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        self._http.close()

    def abort(self) -> None:
        """Called in another thread: what goes on here ends at once, with an error where it is awaited.

        To leave a stream's iterator is enough between two pieces of it; this also ends the wait for the next one.
        """
        self._aborted = True
        for reference in self._connections.valuerefs():
            if (connection := reference()) is not None:
                with suppress(OSError):  # it is closed already
                    connection.get_extra_info("socket").shutdown(socket.SHUT_RDWR)

    def models(self) -> tuple[ModelCard, ...]:
        """What is served."""
        return self._parse(ModelList, self._get("/v1/models")).data

    def health(self) -> dict[str, Any]:
        """What `/health` says of an engine that makes progress; raises EngineUnavailable for one that does not."""
        response = self._send("GET", "/health")
        try:
            found = response.json() if response.content else {}
        except ValueError:
            found = {}
        return found if isinstance(found, dict) else {}

    def metrics(self) -> str:
        """Prometheus' text format."""
        return self._send("GET", "/metrics", follow_redirects=True).text

    def complete(
        self,
        prompt: str | Sequence[int],
        sampling: Sampling = GREEDY,
        *,
        n: int = 1,
        logprobs: bool = False,
        token_ids: bool = False,
    ) -> list[Written]:
        """`n` continuations of a text or of token ids."""
        body = self._completion(prompt, sampling, n=n, logprobs=logprobs, token_ids=token_ids)
        return _completions(self._parse(CompletionAnswer, self._post("/v1/completions", body)))

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        sampling: Sampling = GREEDY,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        n: int = 1,
        logprobs: bool = False,
        token_ids: bool = False,
    ) -> list[Written]:
        """`n` answers to the last message."""
        body = self._chat(messages, sampling, tools=tools, n=n, logprobs=logprobs, token_ids=token_ids)
        return _chats(self._parse(ChatAnswer, self._post("/v1/chat/completions", body)))

    def stream_complete(
        self, prompt: str | Sequence[int], sampling: Sampling = GREEDY, **more: Any
    ) -> Iterator[Written]:
        """The same as it is written; leaving the iterator closes the connection, which ends the engine's work."""
        body = self._completion(prompt, sampling, **more) | {"stream": True}
        for event in self._events("/v1/completions", body):
            yield from _completions(self._parse(CompletionAnswer, event))

    def stream_chat(
        self, messages: Sequence[Mapping[str, Any]], sampling: Sampling = GREEDY, **more: Any
    ) -> Iterator[Written]:
        """The same as it is written; leaving the iterator closes the connection, which ends the engine's work."""
        body = self._chat(messages, sampling, **more) | {"stream": True}
        for event in self._events("/v1/chat/completions", body):
            yield from _chats(self._parse(ChatAnswer, event))

    def score(self, ids: Sequence[int]) -> Scores:
        """Log-probabilities of token ids, two at least; the engine generates one token more, which is dropped."""
        body = self._completion(ids, Sampling(max_tokens=1, temperature=0.0)) | {"prompt_logprobs": 1}
        (choice,) = self._parse(CompletionAnswer, self._post("/v1/completions", body)).choices
        found = choice.prompt_logprobs
        if found is None or len(found) != len(ids):
            raise EngineFailed(f"{self.base_url}: no log-probabilities of the prompt in its answer")
        own, top = [], []
        for token, alternatives in zip(ids[1:], found[1:], strict=True):
            assert alternatives is not None, "only the first token has nothing before it"
            own.append(alternatives[str(token)].logprob)
            top.append(int(max(alternatives, key=lambda name: alternatives[name].logprob)))
        return Scores(tuple(own), tuple(top))

    def tokenize(
        self,
        prompt: str | None = None,
        *,
        messages: Sequence[Mapping[str, Any]] | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
    ) -> TokenizeAnswer:
        """The ids of a text, or of messages under the engine's chat template."""
        request = TokenizeRequest(
            model=self.served(),
            prompt=prompt,
            messages=None if messages is None else tuple(map(dict, messages)),
            tools=None if tools is None else tuple(map(dict, tools)),
            add_generation_prompt=add_generation_prompt,
        )
        body = request.model_dump(exclude_none=True, exclude={"add_special_tokens"} if messages is not None else set())
        return self._parse(TokenizeAnswer, self._post("/tokenize", body))

    def detokenize(self, ids: Sequence[int]) -> str:
        """The text of token ids, special tokens included."""
        request = DetokenizeRequest(model=self.served(), tokens=tuple(ids))
        return self._parse(DetokenizeAnswer, self._post("/detokenize", request.model_dump())).prompt

    def served(self) -> str:
        """The model that requests name."""
        if self.model is None:
            cards = self.models()
            if not cards:
                raise EngineUnavailable(f"{self.base_url} serves no model yet")
            self.model = cards[0].id
        return self.model

    def _completion(
        self, prompt: str | Sequence[int], sampling: Sampling, *, n: int = 1, logprobs: bool = False,
        token_ids: bool = False,
    ) -> dict[str, Any]:  # fmt: skip
        fields = sampling.fields() | ({"logprobs": 0} if logprobs else {}) | ({"n": n} if n > 1 else {})
        fields |= {"return_token_ids": True} if token_ids else {}
        return _body(CompletionRequest, model=self.served(), prompt=prompt, **fields)

    def _chat(
        self, messages: Sequence[Mapping[str, Any]], sampling: Sampling, *,
        tools: Sequence[Mapping[str, Any]] | None = None, n: int = 1, logprobs: bool = False, token_ids: bool = False,
    ) -> dict[str, Any]:  # fmt: skip
        fields = sampling.fields() | ({"logprobs": True} if logprobs else {}) | ({"n": n} if n > 1 else {})
        fields |= ({"return_token_ids": True} if token_ids else {}) | ({"tools": list(tools)} if tools else {})
        return _body(ChatRequest, model=self.served(), messages=list(messages), **fields)

    def _trace(self, event: str, info: Mapping[str, Any]) -> None:
        """Keeps each connection that httpcore makes: to close one does not wake the thread that reads from it."""
        if event.endswith(("connect_tcp.complete", "start_tls.complete")):
            self._connections[id(info["return_value"])] = info["return_value"]
            if self._aborted:
                self.abort()

    def _get(self, path: str) -> bytes:
        return self._send("GET", path).content

    def _post(self, path: str, body: dict[str, Any]) -> bytes:
        return self._send("POST", path, json=body).content

    def _send(self, method: str, path: str, **more: Any) -> httpx.Response:
        try:
            response = self._http.request(method, path, **more)
        except httpx.HTTPError as error:
            raise self._unreachable(error) from error
        self._judge(response)
        return response

    def _events(self, path: str, body: dict[str, Any]) -> Iterator[str]:
        """The data of each event. Raises EngineFailed for an error event and for a stream that ends without [DONE]."""
        begun = False
        try:
            with self._http.stream("POST", path, json=body) as response:
                if response.status_code != httpx.codes.OK:
                    response.read()
                self._judge(response)
                for line in response.iter_lines():
                    if not line.startswith("data:"):
                        continue
                    data = line.removeprefix("data:").strip()
                    if data == DONE:
                        return
                    begun = True
                    if (error := _error_in(data)) is not None:
                        raise EngineFailed(f"{self.base_url}: the stream failed: {error.message}")
                    yield data
        except httpx.HTTPError as error:
            if begun:
                raise EngineFailed(f"{self.base_url}: the stream broke off ({error})") from error
            raise self._unreachable(error) from error
        raise EngineFailed(f"{self.base_url}: the stream ended without [DONE]: the answer is not whole")

    def _judge(self, response: httpx.Response) -> None:
        if response.is_success:
            return
        error = _error_in(response.text) or ErrorBody(message=response.text[:500], type="")
        status = response.status_code
        if status in (httpx.codes.TOO_MANY_REQUESTS, httpx.codes.SERVICE_UNAVAILABLE):
            raise EngineUnavailable(f"{self.base_url} takes no request now ({status}): {error.message}")
        if status < httpx.codes.INTERNAL_SERVER_ERROR:
            raise RequestRefused(f"{self.base_url} refuses the request ({status}): {error.message}", status, error.code)
        raise EngineFailed(f"{self.base_url} failed ({status}): {error.message}")

    def _unreachable(self, error: httpx.HTTPError) -> EngineUnavailable:
        return EngineUnavailable(
            f"{self.base_url} does not answer ({type(error).__name__}: {error}); is it running? "
            "`python serve.py` starts it"
        )

    def _parse(self, kind: type[Parsed], content: bytes | str) -> Parsed:
        try:
            return kind.model_validate_json(content)
        except ValidationError as error:
            raise EngineFailed(f"{self.base_url}: its answer is no {kind.__name__}: {error}") from error


def _body(kind: type[Request], **fields: Any) -> dict[str, Any]:
    """A request's body: what was set, nothing else, so that engines of other makers are not told our defaults."""
    try:
        request = kind(**fields)
    except ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, one['loc'][:1]))}: {one['msg']}" for one in error.errors())
        raise RequestRefused(f"not a valid request: {problems}", 400, "invalid_request") from error
    return request.model_dump(mode="json", exclude_unset=True)


def _error_in(text: str) -> ErrorBody | None:
    try:
        found = json.loads(text)
        return ErrorBody.model_validate(found["error"]) if isinstance(found, dict) and "error" in found else None
    except ValueError:  # no JSON, or another form of error
        return None


def _completions(answer: CompletionAnswer) -> list[Written]:
    return [
        Written(
            choice.text,
            choice.finish_reason,
            choice.token_ids,
            choice.prompt_token_ids,
            None if choice.logprobs is None else tuple(one or 0.0 for one in choice.logprobs.token_logprobs),
            choice.index,
        )
        for choice in answer.choices
    ]


def _chats(answer: ChatAnswer) -> list[Written]:
    written = []
    for choice in answer.choices:
        message = choice.message or choice.delta
        content = choice.logprobs.content if choice.logprobs else None
        written.append(
            Written(
                (message.content if message else None) or "",
                choice.finish_reason,
                choice.token_ids,
                answer.prompt_token_ids,
                None if content is None else tuple(one.logprob for one in content),
                choice.index,
            )
        )
    return written
