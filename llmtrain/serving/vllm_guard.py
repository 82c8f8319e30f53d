"""What stands in front of vLLM's own server, inside its process: `--middleware llmtrain_vllm_guard.Guard`.

vLLM answers bad requests well. What it does not do, and this does: `/health` says whether tokens come, not whether a
socket listens; a stream that fails ends with an error and never with `[DONE]`; a request that an abort cut short is no
answer; large bodies are not read; while it ends (`draining`) new requests get 503, where vLLM says 500; every refusal
has OpenAI's form; routes that nobody asked for are closed; `max_tokens` has a default and tools stay text, as the
protocol of `llmtrain.client.protocol` has it.

It runs in the environment of vLLM, which has no llmtrain: it imports the standard library and prometheus_client only. A
proxy of its own process would have cost a hop and a copy for each token; this costs a function call.
"""

import asyncio
import json
import os
import time
import traceback
from collections.abc import Awaitable, Callable
from typing import Any

from prometheus_client import REGISTRY, CollectorRegistry, Gauge

Scope = dict[str, Any]
Message = dict[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

SETTINGS = "LLMTRAIN_VLLM_GUARD"
"""The environment variable that has the guard's settings, as JSON."""
IN_FLIGHT = "llmtrain:requests_in_flight"
"""Prometheus' name of the requests that have come and not been answered to the end."""
DISCARDED_BYTES = 64 * 2**20
"""Most bytes of a body that is too large that are read before the answer; then the connection is cut."""
GENERATES = ("/v1/completions", "/v1/chat/completions")
ROUTES = dict.fromkeys((*GENERATES, "/tokenize", "/detokenize"), "POST")
ROUTES |= dict.fromkeys(("/v1/models", "/metrics", "/metrics/", "/version", "/health"), "GET")
COUNTS = ("vllm:generation_tokens_total", "vllm:prompt_tokens_total", "vllm:kv_cache_usage_perc")
"""A step of the engine changes one of them: the last one also where a part of a long prompt was computed."""
ABORTED = b'"finish_reason":"abort"'
"""No text can hold it: quotation marks in texts are escaped."""
FAILED_EVENT = b'data: {"error"'
LAST_EVENT = b"data: [DONE]"
TYPES = {400: "invalid_request_error", 404: "not_found_error", 405: "invalid_request_error",
         413: "request_too_large", 429: "rate_limit_error", 503: "service_unavailable"}  # fmt: skip


class Guard:
    """ASGI middleware around vLLM's application, whose metrics are in `registry`."""

    def __init__(self, app: App, registry: CollectorRegistry = REGISTRY) -> None:
        settings = json.loads(os.environ[SETTINGS])
        self.app, self.registry = app, registry
        self.model: str = settings["model"]
        self.draining: str = settings["draining"]
        """Path of a file that is there from the moment when no new request may begin."""
        self.max_body_bytes: int = settings["max_body_bytes"]
        self.max_in_flight: int = settings["max_in_flight"]
        """Requests for text that are under way or wait."""
        self.default_max_tokens: int = settings["default_max_tokens"]
        self.progress_seconds: float = settings["progress_seconds"]
        self.in_flight = 0
        gauge = Gauge(IN_FLIGHT, "Requests that are not answered to the end", registry=registry)
        gauge.set_function(lambda: self.in_flight)
        self.is_warm = False
        self.counts: tuple[float, ...] = ()
        self.progress_at = time.monotonic()
        """When the engine was last seen to have computed something."""
        self.probe: asyncio.Task[bool] | None = None
        self.probe_at = 0.0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            return await self.app(scope, receive, send)
        if scope["type"] != "http":
            return None  # a websocket: closed by the server
        path, method = scope["path"], scope["method"]
        if path not in ROUTES:
            return await refuse(send, 404, f"there is no {path} here; {', '.join(sorted(ROUTES))} are")
        if method != ROUTES[path]:
            return await refuse(send, 405, f"{path} takes {ROUTES[path]}, not {method}")
        if path == "/health":
            return await self._health(scope, send)
        if method == "GET":
            return await self.app(scope, receive, send)
        self.in_flight += 1
        try:
            return await self._request(scope, receive, send)
        finally:
            self.in_flight -= 1

    async def _request(self, scope: Scope, receive: Receive, send: Send) -> None:
        if os.path.exists(self.draining):
            return await refuse(send, 503, "the server is ending: send the request to another one")
        if scope["path"] in GENERATES and self.in_flight > self.max_in_flight:
            return await refuse(send, 429, f"{self.max_in_flight} requests are under way or wait: try again later")
        body = await self._body(receive)
        if body is None:
            return await refuse(send, 413, f"the body is larger than {self.max_body_bytes} bytes, the most allowed")
        try:
            request = json.loads(body)
        except (ValueError, RecursionError) as error:
            return await refuse(send, 400, f"the body is not JSON: {str(error)[:200]}")
        if not isinstance(request, dict):
            return await refuse(send, 400, f"the body is a {type(request).__name__}, not an object")
        if scope["path"] in GENERATES and self._amend(scope["path"], request):
            body = json.dumps(request).encode()
        answer = Answer(send)
        try:
            await self.app(scope, replay(body, receive), answer)
        except Exception:
            traceback.print_exc()  # to the log
            await answer.fail("the server failed: its log says why")
        return None

    async def _body(self, receive: Receive) -> bytes | None:
        """All of it; None where it is too large. It is read on and dropped then, since a client that still writes does
        not see what it is told; up to a limit."""
        parts, size, more = [], 0, True
        while more and size <= DISCARDED_BYTES:
            message = await receive()
            more = message.get("more_body", False)
            parts.append(message.get("body", b""))
            size += len(parts[-1])
            if size > self.max_body_bytes:
                parts.clear()
        return b"".join(parts) if size <= self.max_body_bytes else None

    def _amend(self, path: str, request: dict[str, Any]) -> bool:
        """Put in what the request leaves out; whether there was something."""
        names = ("max_tokens", "max_completion_tokens") if path.endswith("chat/completions") else ("max_tokens",)
        added: dict[str, Any] = {}
        if all(request.get(name) is None for name in names):
            added["max_tokens"] = self.default_max_tokens
        if request.get("tools") and "tool_choice" not in request:
            added["tool_choice"] = "none"  # the template shows them; the answer stays text
        request.update(added)
        return bool(added)

    async def _health(self, scope: Scope, send: Send) -> None:
        if os.path.exists(self.draining):
            return await refuse(send, 503, "the server is ending")
        if not await self._moves(scope):
            state = "makes no progress" if self.is_warm else "is not ready"
            return await refuse(send, 503, f"the engine {state}: no token for {self._idle_seconds():.0f} s")
        self.is_warm = True
        found = {"status": "ok", "requests_in_flight": self.in_flight, "idle_seconds": round(self._idle_seconds(), 3)}
        return await respond(send, 200, json.dumps(found).encode())

    async def _moves(self, scope: Scope) -> bool:
        """Whether the engine has computed something within `progress_seconds`.

        It is asked for a token where it has not for half of that time, and at the start, when the first token with
        log-probabilities compiles what later ones use.
        """
        patience = self.progress_seconds / 2
        self._look()
        if self.is_warm and self._idle_seconds() < patience:
            return True
        if self.probe is None or self.probe.done():
            self.probe, self.probe_at = asyncio.create_task(self._token(scope)), time.monotonic()
        left = self.probe_at + patience - time.monotonic()
        await asyncio.wait({self.probe}, timeout=max(left, 0) if self.is_warm else patience)
        self._look()
        if not self.is_warm:
            return self.probe.done() and self.probe.result()
        return self._idle_seconds() < self.progress_seconds

    def _look(self) -> None:
        samples = [one for metric in self.registry.restricted_registry(COUNTS).collect() for one in metric.samples]
        counts = tuple(one.value for one in samples)
        if counts != self.counts:
            self.counts, self.progress_at = counts, time.monotonic()

    def _idle_seconds(self) -> float:
        return time.monotonic() - self.progress_at

    async def _token(self, scope: Scope) -> bool:
        """Whether vLLM answers a request for one token."""
        wanted = {"model": self.model, "prompt": [0, 0], "max_tokens": 1, "temperature": 0}
        wanted |= {} if self.is_warm else {"logprobs": 1, "prompt_logprobs": 1}
        statuses: list[int] = []

        async def send(message: Message) -> None:
            if "status" in message:
                statuses.append(message["status"])

        headers = [(b"content-type", b"application/json")]
        path = GENERATES[0]
        request = scope | {"method": "POST", "path": path, "raw_path": path.encode(), "headers": headers}
        try:
            await self.app(request, replay(json.dumps(wanted).encode(), asyncio.Event().wait), send)
        except Exception:
            traceback.print_exc()
        if statuses == [200]:
            self.progress_at = time.monotonic()
        return statuses == [200]


class Answer:
    """Passes on what vLLM answers, and mends how it fails."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self._start: Message | None = None
        """The head of an answer that is not a stream, until its body is known."""
        self._begun = False
        self._ended = False
        self._parts: list[bytes] = []

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            if is_stream(message):
                self._begun = True
                await self._send(message)
            else:
                self._start = message
        elif self._start is not None:
            self._parts.append(message.get("body", b""))
            if not message.get("more_body", False):
                await self._whole(self._start, b"".join(self._parts))
        elif not self._ended:
            await self._piece(message)

    async def fail(self, text: str) -> None:
        """End with an error, in whatever place the answer is."""
        if self._ended:
            return
        self._ended = True
        if self._begun:
            event = b"data: " + error_body(500, text) + b"\n\n"
            await self._send({"type": "http.response.body", "body": event, "more_body": False})
        else:
            await refuse(self._send, 500, text)

    async def _piece(self, message: Message) -> None:
        body: bytes = message.get("body", b"")
        if ABORTED in body:
            await self.fail("the server ended before the answer did")
        elif body.startswith(FAILED_EVENT):  # vLLM would go on to [DONE]
            self._ended = True
            event = body.partition(LAST_EVENT)[0]
            await self._send({"type": "http.response.body", "body": event, "more_body": False})
        else:
            self._ended = not message.get("more_body", False)
            await self._send(message)

    async def _whole(self, start: Message, body: bytes) -> None:
        self._ended = True
        status = start["status"]
        if status == 200 and ABORTED in body:
            await refuse(self._send, 503, "the server ended before the answer did: send the request to another one")
        elif status >= 400 and b'"error"' not in body[:20]:  # {"detail": ...}, FastAPI's own form
            await refuse(self._send, status, body.decode(errors="replace")[:500])
        else:
            await self._send(start)
            await self._send({"type": "http.response.body", "body": body})


def is_stream(start: Message) -> bool:
    return any(name.lower() == b"content-type" and b"event-stream" in value for name, value in start["headers"])


def replay(body: bytes, then: Callable[[], Awaitable[Any]]) -> Receive:
    """`receive` for a body that was read already; what comes after it is the client's going away."""
    given = False

    async def receive() -> Message:
        nonlocal given
        if given:
            message: Message = await then()
            return message
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return receive


def error_body(status: int, text: str) -> bytes:
    """OpenAI's form."""
    error = {"message": text, "type": TYPES.get(status, "server_error"), "param": None, "code": status}
    return json.dumps({"error": error}).encode()


async def refuse(send: Send, status: int, text: str) -> None:
    """Answer with an error; where the body may not have been read, the connection ends with it."""
    headers = [(b"connection", b"close")] if status in (413, 429, 503) else []
    headers += [(b"retry-after", b"1")] if status in (429, 503) else []
    await respond(send, status, error_body(status, text), headers)


async def respond(send: Send, status: int, body: bytes, headers: list[tuple[bytes, bytes]] | None = None) -> None:
    fixed = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": [*fixed, *(headers or [])]})
    await send({"type": "http.response.body", "body": body})
