"""What stands in front of vLLM's server: refusals, defaults, how streams end, and a health that means progress."""

import asyncio
import json
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client import CollectorRegistry, Counter

from llmtrain.serving import vllm_guard
from llmtrain.serving.vllm_guard import Guard

REQUEST = {"model": "tiny", "prompt": "a", "max_tokens": 2}


class Upstream:
    """vLLM's place: keeps what it was asked, answers with `script`."""

    def __init__(self) -> None:
        self.requests: list[dict[str, Any]] = []
        self.registry = CollectorRegistry()
        self.tokens = Counter("vllm:generation_tokens", "", registry=self.registry)
        self.hangs = asyncio.Event()
        self.hangs.set()
        self.script: Callable[..., Awaitable[None]] = whole(200, {"choices": []})

    async def __call__(self, scope, receive, send) -> None:
        body = b""
        if scope["method"] == "POST":
            body = (await receive())["body"]
        self.requests.append(json.loads(body or b"{}"))
        await self.hangs.wait()
        self.tokens.inc()
        await self.script(send)


def whole(status: int, body: Any) -> Callable[..., Awaitable[None]]:
    async def script(send) -> None:
        head = {"type": "http.response.start", "status": status, "headers": [(b"content-type", b"application/json")]}
        await send(head)
        await send({"type": "http.response.body", "body": json.dumps(body, separators=(",", ":")).encode()})

    return script


def stream(*events: str, raises: Exception | None = None) -> Callable[..., Awaitable[None]]:
    async def script(send) -> None:
        kind = b"text/event-stream; charset=utf-8"
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", kind)]})
        for event in events:
            await send({"type": "http.response.body", "body": f"data: {event}\n\n".encode(), "more_body": True})
        if raises:
            raise raises
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    return script


@pytest.fixture
def upstream() -> Upstream:
    return Upstream()


@pytest.fixture
def guard(upstream: Upstream, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Guard:
    settings = {"model": "tiny", "draining": str(tmp_path / "draining"), "max_body_bytes": 1000, "max_in_flight": 2,
                "default_max_tokens": 77, "progress_seconds": 0.4}  # fmt: skip
    monkeypatch.setenv(vllm_guard.SETTINGS, json.dumps(settings))
    return Guard(upstream, upstream.registry)


def ask(guard: Guard, *requests: tuple[str, str, Any]) -> list[httpx.Response]:
    """The answers to requests that are sent at the same time: method, path, and a body as JSON or as bytes."""

    async def all_of_them() -> list[httpx.Response]:
        transport = httpx.ASGITransport(app=guard, raise_app_exceptions=True)  # type: ignore[arg-type]
        async with httpx.AsyncClient(transport=transport, base_url="http://engine") as client:
            bodies = [{"content": body} if isinstance(body, bytes) else {"json": body} for _, _, body in requests]
            sent = [
                client.request(method, path, **(body if method == "POST" else {}))
                for (method, path, _), body in zip(requests, bodies, strict=True)
            ]
            return await asyncio.gather(*sent)

    return asyncio.run(all_of_them())


def complete(guard: Guard, body: Any = REQUEST, path: str = "/v1/completions") -> httpx.Response:
    (response,) = ask(guard, ("POST", path, body))
    return response


def error_of(response: httpx.Response) -> dict[str, Any]:
    found = response.json()
    assert set(found) == {"error"}
    assert set(found["error"]) == {"message", "type", "param", "code"}
    return found["error"]


@pytest.mark.parametrize(
    ("body", "status", "says"),
    [
        (b'{"prompt": ', 400, "not JSON"),
        (b"\xff\xfe", 400, "not JSON"),
        (b"[" * 900, 400, "not JSON"),
        (b'{"a":' + b"9" * 900 + b"}", 200, ""),
        (b"[1]", 400, "a list, not an object"),
        (b"", 400, "not JSON"),
        (b" " * 1001, 413, "larger than 1000 bytes"),
        (b" " * 10_000_000, 413, "larger than 1000 bytes"),
    ],
)
def test_what_is_no_object_or_too_large_does_not_reach_vllm(guard, upstream, body, status, says):
    response = complete(guard, body)
    assert response.status_code == status
    if status == 200:
        assert len(upstream.requests) == 1
    else:
        assert says in error_of(response)["message"]
        assert upstream.requests == []


def test_a_body_is_nested_no_deeper_than_python_reads(guard, upstream):
    guard.max_body_bytes = 1_000_000
    assert "not JSON" in error_of(complete(guard, b"[" * 100_000))["message"]


def test_only_the_protocols_routes_are_open(guard, upstream):
    for path in ("/inference/v1/abort_requests", "/scale_elastic_ep", "/v1/responses", "/docs", "/"):
        response = complete(guard, {}, path)
        assert (response.status_code, error_of(response)["type"]) == (404, "not_found_error")
    (response,) = ask(guard, ("GET", "/v1/completions", None))
    assert response.status_code == 405
    assert upstream.requests == []
    assert ask(guard, ("GET", "/v1/models", None))[0].status_code == 200


@pytest.mark.parametrize(
    ("path", "given", "reaches"),
    [
        ("/v1/completions", {"prompt": "a"}, {"prompt": "a", "max_tokens": 77}),
        ("/v1/completions", {"max_tokens": None}, {"max_tokens": 77}),
        ("/v1/completions", {"max_tokens": 5}, {"max_tokens": 5}),
        ("/v1/chat/completions", {"max_completion_tokens": 5}, {"max_completion_tokens": 5}),
        ("/v1/chat/completions", {"tools": [{}]}, {"tools": [{}], "max_tokens": 77, "tool_choice": "none"}),
        ("/v1/chat/completions", {"tools": [{}], "tool_choice": "auto", "max_tokens": 1},
         {"tools": [{}], "tool_choice": "auto", "max_tokens": 1}),
        ("/tokenize", {"prompt": "a"}, {"prompt": "a"}),
    ],
)  # fmt: skip
def test_what_a_request_leaves_out_is_put_in(guard, upstream, path, given, reaches):
    complete(guard, given, path)
    assert upstream.requests == [reaches]


def test_more_requests_than_may_wait_get_429_at_once(guard, upstream):
    async def some() -> list[int]:
        upstream.hangs.clear()
        transport = httpx.ASGITransport(app=guard)  # type: ignore[arg-type]
        async with httpx.AsyncClient(transport=transport, base_url="http://engine") as client:
            sent = [asyncio.create_task(client.post("/v1/completions", json=REQUEST)) for _ in range(3)]
            done, _ = await asyncio.wait(sent, return_when=asyncio.FIRST_COMPLETED)
            (refused,) = done
            assert refused.result().headers["retry-after"] == "1"
            assert guard.in_flight == 2
            upstream.hangs.set()
            return sorted([(await one).status_code for one in sent])

    assert asyncio.run(some()) == [200, 200, 429]
    assert guard.in_flight == 0
    assert upstream.registry.get_sample_value(vllm_guard.IN_FLIGHT) == 0


def test_no_new_request_once_it_drains(guard, upstream):
    Path(guard.draining).touch()
    response = complete(guard)
    assert (response.status_code, response.headers["connection"]) == (503, "close")
    assert ask(guard, ("GET", "/health", None))[0].status_code == 503
    assert ask(guard, ("GET", "/metrics", None))[0].status_code == 200
    assert len(upstream.requests) == 1  # the metrics


def test_a_stream_that_ends_well_is_passed_on_byte_for_byte(guard, upstream):
    text = '{"choices":[{"text":"data: {\\"error\\" \\"finish_reason\\":\\"abort\\" "}]}'
    upstream.script = stream(text, "[DONE]")
    assert complete(guard).content == f"data: {text}\n\ndata: [DONE]\n\n".encode()


@pytest.mark.parametrize(
    "script",
    [
        stream('{"choices":[]}', '{"error":{"message":"engine died","type":"InternalServerError"}}', "[DONE]"),
        stream('{"choices":[]}', '{"choices":[{"text":"","finish_reason":"abort"}]}', "[DONE]"),
        stream('{"choices":[]}', raises=RuntimeError("broken")),
        stream('{"choices":[]}', '{"error":{"message":"x"}}\n\ndata: [DONE]'),
    ],
    ids=["error", "abort", "raises", "in one piece"],
)
def test_a_stream_that_fails_ends_with_an_error_and_never_with_done(guard, upstream, script):
    upstream.script = script
    response = complete(guard)
    events = [event.removeprefix("data: ") for event in response.text.strip().split("\n\n")]
    assert events[0] == '{"choices":[]}'
    assert "error" in json.loads(events[-1])
    assert len(events) == 2


def test_an_answer_that_was_cut_short_is_none(guard, upstream):
    upstream.script = whole(200, {"choices": [{"text": "half", "finish_reason": "abort"}]})
    response = complete(guard)
    assert (response.status_code, error_of(response)["type"]) == (503, "service_unavailable")


def test_errors_have_one_form(guard, upstream):
    upstream.script = whole(400, {"detail": "There was an error parsing the body"})
    assert "parsing the body" in error_of(complete(guard))["message"]
    theirs = {"error": {"message": "no such model", "type": "NotFoundError", "param": "model", "code": 404}}
    upstream.script = whole(404, theirs)
    assert complete(guard).json() == theirs

    async def broken(send) -> None:
        raise RuntimeError("broken")

    upstream.script = broken
    assert (complete(guard).status_code, guard.in_flight) == (500, 0)


def health(guard: Guard) -> int:
    return ask(guard, ("GET", "/health", None))[0].status_code


def test_it_is_ready_after_its_first_token_with_logprobs(guard, upstream):
    upstream.script = whole(503, {"error": {}})
    assert health(guard) == 503
    upstream.script = whole(200, {})
    assert health(guard) == 200
    assert upstream.requests[-1]["prompt_logprobs"] == upstream.requests[-1]["logprobs"] == 1
    asked = len(upstream.requests)
    assert health(guard) == 200  # a moment later nothing has to be proved
    assert len(upstream.requests) == asked


def test_an_idle_engine_proves_itself_with_one_token(guard, upstream):
    assert health(guard) == 200
    guard.progress_at -= 10
    assert health(guard) == 200
    assert (len(upstream.requests), upstream.requests[-1]["max_tokens"]) == (2, 1)


def test_tokens_of_others_are_progress_too(guard, upstream):
    assert health(guard) == 200
    guard.progress_at -= 10
    upstream.tokens.inc()
    assert health(guard) == 200
    assert len(upstream.requests) == 1


def test_an_engine_that_hangs_is_not_healthy_until_it_goes_on(guard, upstream):
    async def story() -> list[int]:
        transport = httpx.ASGITransport(app=guard)  # type: ignore[arg-type]
        async with httpx.AsyncClient(transport=transport, base_url="http://engine") as client:
            seen = [(await client.get("/health")).status_code]
            upstream.hangs.clear()
            guard.progress_at -= 10
            seen.append((await client.get("/health")).status_code)
            seen.append((await client.get("/health")).status_code)
            probes = len(upstream.requests)
            upstream.hangs.set()
            await asyncio.sleep(0.05)
            seen.append((await client.get("/health")).status_code)
            assert probes == 2  # the first, and one that is still waited for
            return seen

    assert asyncio.run(story()) == [200, 503, 503, 200]
