"""An endpoint that answers from a script and can fail in the ways that endpoints do; it remembers what it was asked."""

import asyncio
import json
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, StreamingResponse


@dataclass
class Endpoint:
    """`pieces` are what every answer consists of; a model's name says what goes wrong with it."""

    url: str = ""
    models: tuple[str, ...] = ("good@1.0.0",)
    pieces: tuple[str, ...] = ("One", " two", " three")
    pause_s: float = 0.0
    """Before each piece."""
    asked: list[dict[str, Any]] = field(default_factory=list)
    """The bodies of the requests, in their order."""
    gone: list[str] = field(default_factory=list)
    """Models whose reader went away before the end."""
    most_at_once: int = 0
    _now: int = 0

    async def answer(self, body: dict[str, Any]) -> AsyncIterator[str]:
        self._now += 1
        self.most_at_once = max(self.most_at_once, self._now)
        try:
            for number, piece in enumerate(self.pieces):
                if body["model"] == "silent" and number == 1:
                    await asyncio.sleep(3600)
                await asyncio.sleep(self.pause_s)
                if body["model"] == "breaks" and number == 2:
                    raise ConnectionResetError("this endpoint breaks off")
                if body["model"] == "fails" and number == 2:
                    yield _event({"error": {"message": "out of <b>memory</b>", "type": "server_error"}})
                    return
                yield _event(_chunk(body["model"], {"content": piece}, None))
            reason = "length" if body["model"] == "short" else "stop"
            yield _event(_chunk(body["model"], {}, reason))
            yield "data: [DONE]\n\n"
        except asyncio.CancelledError:
            self.gone.append(body["model"])
            raise
        finally:
            self._now -= 1


def _chunk(model: str, delta: dict[str, str], reason: str | None) -> dict[str, Any]:
    choice = {"index": 0, "delta": delta, "finish_reason": reason}
    return {"id": "1", "object": "chat.completion.chunk", "created": 1, "model": model, "choices": [choice]}


def _event(data: dict[str, Any]) -> str:
    return f"data: {json.dumps(data)}\n\n"


def _app(endpoint: Endpoint) -> FastAPI:
    app = FastAPI()

    @app.get("/v1/models")
    def models() -> dict[str, Any]:
        return {"object": "list", "data": [{"id": model, "object": "model"} for model in endpoint.models]}

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Any:
        body = await request.json()
        endpoint.asked.append(body)
        if body["model"] == "busy":
            return JSONResponse({"error": {"message": "too many requests", "type": "rate_limit"}}, 429)
        return StreamingResponse(endpoint.answer(body), media_type="text/event-stream")

    return app


@contextmanager
def serving(endpoint: Endpoint, port: int = 0) -> Iterator[Endpoint]:
    """Serve it on loopback in a thread; at the end the connections are closed."""
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("127.0.0.1", port))
        listener.listen()
        endpoint.url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        server = uvicorn.Server(uvicorn.Config(_app(endpoint), log_level="critical", timeout_graceful_shutdown=1))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        try:
            yield endpoint
        finally:
            server.should_exit = True
            thread.join()


def wait_for(holds: Callable[[], object]) -> None:
    """What another thread or process brings about, within a minute."""
    for _ in range(1200):
        if holds():
            return
        time.sleep(0.05)
    raise AssertionError("it did not come about within a minute")
