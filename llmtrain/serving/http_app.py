"""LitServe's app without LitServe's pages: every answer is OpenAI's, errors too, and every request is counted."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI
from litserve import LitServer
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from llmtrain.serving.http_errors import Refused, no_such_path
from llmtrain.serving.litserve_api import EngineAPI, Pipe
from llmtrain.serving.metrics import PATHS, endpoint_of
from llmtrain.serving.openai_spec import OpenAISpec

CLIENT_GONE = 499
"""Status of requests whose client went away, as nginx has it."""


class Server(LitServer):
    """LitServe's app and its way to start an engine, without its pages, its manager and its queues."""

    def __init__(self, api: EngineAPI, spec: OpenAISpec, accelerator: str, pipe: Pipe, queue: Any) -> None:
        super().__init__(
            api,
            accelerator=accelerator,
            devices=1,
            timeout=False,
            disable_openapi_url=True,
            middlewares=[(Counted, {"spec": spec})],
        )
        self._transport = pipe
        self.workers_setup_status: dict[str, str] = {}
        self.litapi_request_queues[api.api_path] = queue
        self.app.add_exception_handler(Refused, refused)
        self.app.add_exception_handler(HTTPException, http_exception)
        self.app.add_exception_handler(ClientDisconnect, client_gone)
        self.app.add_exception_handler(Exception, unexpected)

    def _register_internal_endpoints(self) -> None:
        """None of LitServe's: `/health` is the spec's, and `/info` is nobody's business."""

    @asynccontextmanager
    async def lifespan(self, app: FastAPI) -> AsyncIterator[None]:
        """What LitServe reads answers in is `Endpoint`'s task."""
        yield


class Counted:
    """ASGI middleware: requests by endpoint and status."""

    def __init__(self, app: ASGIApp, spec: OpenAISpec) -> None:
        self._app, self._spec = app, spec

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        status = CLIENT_GONE

        async def noting(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = int(message["status"])
            await send(message)

        try:
            await self._app(scope, receive, noting)
        except Exception:
            status = HTTPStatus.INTERNAL_SERVER_ERROR
            raise
        finally:
            self._spec.flights.metrics.requests.labels(endpoint_of(scope["path"]), str(int(status))).inc()


def refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, Refused), "registered for it"
    return error.response


def http_exception(request: Request, error: Exception) -> Response:
    """What Starlette and FastAPI refuse themselves, in OpenAI's form."""
    assert isinstance(error, HTTPException), "registered for it"
    if error.status_code == HTTPStatus.NOT_FOUND:
        return no_such_path(request.url.path[:200], PATHS).response
    message = f"{error.detail}: {request.method} {request.url.path[:200]}"
    response = Refused(HTTPStatus(error.status_code), message).response
    response.headers.update(error.headers or {})
    return response


def client_gone(request: Request, error: Exception) -> Response:
    """It left while its body was read; nobody will see this."""
    return Response(status_code=CLIENT_GONE)


def unexpected(request: Request, error: Exception) -> Response:
    """A fault of ours; uvicorn writes where it was."""
    message = "the server failed; its log says where"
    return Refused(HTTPStatus.INTERNAL_SERVER_ERROR, message, code="internal_error").response
