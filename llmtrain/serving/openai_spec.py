"""A LitSpec that speaks OpenAI's protocol with vLLM's extensions: the endpoints, in the HTTP server's process.

LitServe's own spec knows chats only, of one prompt each, without token ids, log-probabilities, seeds or stop texts.
"""

import asyncio
import time
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from http import HTTPStatus
from typing import Any, TypeVar

from litserve.specs.base import LitSpec
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from llmtrain.artifacts import ServedModel
from llmtrain.client.client import DONE
from llmtrain.client.protocol import Kind
from llmtrain.config.serving import LitServeServing
from llmtrain.serving.answers import AnswerWriter, Tokens
from llmtrain.serving.flights import Flight, Flights
from llmtrain.serving.http_errors import Refused, as_json, json_response
from llmtrain.serving.jobs import Piece
from llmtrain.serving.reading import Asked, Reader

Result = TypeVar("Result")

LINGER_S, LINGER_BYTES = 2.0, 2**24
"""How long, and for how much, the rest of a body that is too large is read and dropped: a client that still sends when
the connection is closed would not see the answer."""
EVENTS = {"Content-Type": "text/event-stream; charset=utf-8", "Cache-Control": "no-cache", "X-Accel-Buffering": "no"}


class ClientGone(Exception):
    """Nobody is there to be answered."""


class OpenAISpec(LitSpec):
    """`open` completes it, once the model is loaded; until then all but `/health` and `/metrics` say 503."""

    def __init__(self, served: ServedModel, serving: LitServeServing) -> None:
        super().__init__()
        self.api_path = "/v1/chat/completions"  # by which LitServe names the engine's queue
        self._served, self._serving, self._created = served, serving, int(time.time())
        self._reading = ThreadPoolExecutor(1, "reader")  # the tokenizer is not made for more
        self.flights: Flights
        self._reader: Reader
        self._tokens: Tokens
        for path, endpoint, method in (
            ("/v1/chat/completions", self.chat, "POST"),
            ("/v1/completions", self.complete, "POST"),
            ("/v1/models", self.models, "GET"),
            ("/v1/models/{name:path}", self.model, "GET"),
            ("/tokenize", self.tokenize, "POST"),
            ("/detokenize", self.detokenize, "POST"),
            ("/health", self.health, "GET"),
            ("/metrics", self.metrics, "GET"),
        ):
            self.add_endpoint(path, endpoint, [method])

    def __getstate__(self) -> dict[str, Any]:
        """The engine's process has no endpoints."""
        return {"api_path": self.api_path}

    @property
    def stream(self) -> bool:
        return True

    def open(self, reader: Reader, tokens: Tokens) -> None:
        self._reader, self._tokens = reader, tokens

    async def chat(self, request: Request) -> Response:
        return await self._generate("chat", request)

    async def complete(self, request: Request) -> Response:
        return await self._generate("completion", request)

    async def models(self, request: Request) -> Response:
        self.flights.check_open()
        return json_response({"object": "list", "data": [self._card]})

    async def model(self, request: Request) -> Response:
        self.flights.check_open()
        if (name := request.path_params["name"]) != self._served.name:
            message = f"there is no model '{name}' here; '{self._served.name}' is served"
            raise Refused(HTTPStatus.NOT_FOUND, message, param="model", code="model_not_found")
        return json_response(self._card)

    async def tokenize(self, request: Request) -> Response:
        ids = await self._read(request, lambda body: self._reader.tokenize(body))
        return json_response({"count": len(ids), "max_model_len": self._served.context_tokens, "tokens": ids})

    async def detokenize(self, request: Request) -> Response:
        return json_response({"prompt": await self._read(request, lambda body: self._reader.detokenize(body))})

    async def health(self, request: Request) -> Response:
        """200 where an answer can be expected, otherwise 503 with the reason."""
        flights, now = self.flights, time.monotonic()
        fault = flights.refuses or flights.health.fault(
            now, has_work=flights.has_work, progress_seconds=self._serving.progress_seconds
        )
        facts = {
            "status": fault or "ok",
            "model": self._served.name,
            "running": flights.num_running,
            "waiting": flights.num_waiting,
            "tokens_generated": flights.health.tokens_generated,
            "seconds_since_progress": round(now - flights.health.last_progress, 3),
        }
        return json_response(facts, HTTPStatus.SERVICE_UNAVAILABLE if fault else HTTPStatus.OK)

    async def metrics(self, request: Request) -> Response:
        return Response(self.flights.metrics.text(), media_type=CONTENT_TYPE_LATEST)

    @property
    def _card(self) -> dict[str, Any]:
        return {
            "id": self._served.name,
            "object": "model",
            "created": self._created,
            "owned_by": "llmtrain",
            "root": self._served.path,
            "max_model_len": self._served.context_tokens,
        }

    async def _generate(self, kind: Kind, request: Request) -> Response:
        asked = await self._read(request, lambda body: self._reader.asked(kind, body))
        return Generated(asked, self.flights, self._tokens)

    async def _read(self, request: Request, read: Callable[[bytes], Result]) -> Result:
        self.flights.check_open()
        body = await body_of(request, self._serving.max_body_bytes)
        return await asyncio.get_running_loop().run_in_executor(self._reading, read, body)


class Generated(Response):
    """The answer to a request that can be answered: whole, or as events while it is written."""

    def __init__(self, asked: Asked, flights: Flights, tokens: Tokens) -> None:
        super().__init__()
        self._asked, self._flights, self._tokens = asked, flights, tokens

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Gives the jobs to the engine, and takes them back when the client has gone away."""
        with self._flights.flight(self._asked.jobs) as flight:
            answer = AnswerWriter(self._asked, self._tokens, flight.uid)
            work = self._stream(flight, answer, send) if self._asked.request.stream else self._whole(flight, answer)
            try:
                response = await unless_gone(receive, work)
            except ClientGone:
                self._flights.metrics.cancelled.inc()
                return
        if response is not None:
            await response(scope, receive, send)

    async def _whole(self, flight: Flight, answer: AnswerWriter) -> Response:
        pieces: list[list[Piece]] = [[] for _ in flight.jobs]
        async for index, piece in flight.pieces():
            pieces[index].append(piece)
        return json_response(answer.whole(pieces))

    async def _stream(self, flight: Flight, answer: AnswerWriter, send: Send) -> None:
        """Until there is a first token, an error has a status of its own; after it, it is the last event."""
        begun = False

        async def event(content: str, more: bool = True) -> None:
            await send({"type": "http.response.body", "body": f"data: {content}\n\n".encode(), "more_body": more})

        try:
            async for index, piece in flight.pieces():
                if not begun:
                    headers = [(name.lower().encode(), value.encode()) for name, value in EVENTS.items()]
                    await send({"type": "http.response.start", "status": HTTPStatus.OK, "headers": headers})
                    begun = True
                for chunk in answer.chunk(index, piece):
                    await event(as_json(chunk))
        except Refused as refused:
            if not begun:
                raise
            await event(as_json(refused.body), more=False)
            return
        for chunk in answer.last():
            await event(as_json(chunk))
        await event(DONE, more=False)


class TooLarge(Response):
    """413 at once; the rest of the body is dropped for a moment, and the connection closed."""

    def __init__(self, refused: Refused) -> None:
        super().__init__(as_json(refused.body), refused.status, {"Connection": "close"}, "application/json")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        await send({"type": "http.response.body", "body": self.body, "more_body": True})
        num_dropped = 0
        with suppress(TimeoutError):
            async with asyncio.timeout(LINGER_S):
                while num_dropped < LINGER_BYTES:
                    message = await receive()
                    num_dropped += len(message.get("body", b""))
                    if not message.get("more_body", False):
                        break
        await send({"type": "http.response.body", "body": b""})


class BodyTooLarge(Refused):
    """Is answered by `TooLarge`."""

    def __init__(self, limit: int) -> None:
        message = f"the body is larger than {limit} bytes, which serving.max_body_bytes allows"
        super().__init__(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, message, code="body_too_large")

    @property
    def response(self) -> Response:
        return TooLarge(self)


async def body_of(request: Request, limit: int) -> bytes:
    """Raises BodyTooLarge as soon as the body is known to be larger than `limit` bytes; no more of it is kept."""
    if int(request.headers.get("Content-Length", 0)) > limit:
        raise BodyTooLarge(limit)
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > limit:
            raise BodyTooLarge(limit)
    return bytes(body)


async def unless_gone(receive: Receive, work: Coroutine[Any, Any, Result]) -> Result:
    """The result of `work`, which is broken off where the client goes away first. Raises ClientGone then."""

    async def gone() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    tasks: tuple[asyncio.Task[Result], asyncio.Task[None]] = asyncio.create_task(work), asyncio.create_task(gone())
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if tasks[0].done():
            return tasks[0].result()
        raise ClientGone
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
