"""What our supervision costs vLLM: python bench/vllm.py MODEL_DIRECTORY [--json FILE] [--concurrent 1 8 32] [...]

Two servers with equal arguments stand side by side, one bare, one under `python serve.py serving=vllm` with its guard,
and answer in turn the same streams: so many at once, one after another in each. Requests a second, time to the first
token and between tokens, and the CPU time of the API server's process, where the guard is; medians over rounds, ratios
of each round. Aim: at least 0.97 of the bare server's requests a second at each number. `--guard` times the guard alone
around an application that does nothing, without vLLM: what a busy machine disturbs least. `--start` adds start to first
token.

On a GPU: --infra local_gpu --concurrent 500 --requests 500 --prompt-tokens 512 --tokens 128 with Qwen3-0.6B in bf16 is
the published 94.9 requests a second on one H100.
"""

import argparse
import asyncio
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peers import save, table
from prometheus_client import CollectorRegistry

from llmtrain.config.compose import Composer
from llmtrain.config.serve import ServeConfig
from llmtrain.config.serving import VLLMServing
from llmtrain.serving import vllm_guard
from llmtrain.serving.served import served_model
from llmtrain.serving.vllm import MODULE, arguments, environment, interpreter, port_on

ROOT = Path(__file__).parents[1]
GUARDED = ("--middleware",)
"""Options, with their values, that the bare server goes without."""
REST_S = 3.0
"""Between two turns: an engine's worker takes one core for a second after its last answer, from the other server."""


@dataclass(frozen=True)
class Seen:
    """One round of one server."""

    requests_per_second: float
    first_token_ms: float
    """Median over requests."""
    between_tokens_ms: float
    cpu_ms_per_request: float
    """Of the API server's process: HTTP, tokenizer, guard; not of the engine."""


async def stream(port: int, body: dict[str, Any]) -> list[float]:
    """When each event of the answer came; the first time is that of the request. Bare sockets: a client that parses
    JSON would take the core that the server needs."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    content = json.dumps(body).encode()
    head = "POST /v1/completions HTTP/1.1\r\nhost: engine\r\ncontent-type: application/json\r\n"
    times = [time.perf_counter()]
    writer.write(f"{head}connection: close\r\ncontent-length: {len(content)}\r\n\r\n".encode() + content)
    data = b""
    while part := await reader.read(65536):
        times += [time.perf_counter()] * part.count(b"data: {")
        data = (data + part)[-20:]
    writer.close()
    assert b"[DONE]" in data, "the answer is not whole"
    return times


@dataclass(frozen=True)
class Server:
    port: int
    pid: int
    """Of the API server."""
    start_s: float
    """To the first token."""

    def cpu_seconds(self) -> float:
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


async def load(server: Server, chosen: argparse.Namespace, concurrent: int, number: int) -> Seen:
    """`requests` streams, `concurrent` at a time, prompts of random ids that no cache knows."""
    draw = random.Random(f"{number} {concurrent}")
    waiting = [
        {
            "model": "bench", "prompt": [draw.randrange(chosen.vocabulary) for _ in range(chosen.prompt_tokens)],
            "max_tokens": chosen.tokens, "temperature": 0, "ignore_eos": True, "stream": True,
        }
        for _ in range(max(chosen.requests, concurrent))
    ]  # fmt: skip
    count, times = len(waiting), []

    async def one_after_another() -> None:
        while waiting:
            times.append(await stream(server.port, waiting.pop()))

    begin, cpu = time.perf_counter(), server.cpu_seconds()
    await asyncio.gather(*(one_after_another() for _ in range(concurrent)))
    seconds, cpu = time.perf_counter() - begin, server.cpu_seconds() - cpu
    first = [found[1] - found[0] for found in times]
    between = [(found[-1] - found[1]) / max(len(found) - 2, 1) for found in times]
    return Seen(count / seconds, 1000 * statistics.median(first), 1000 * statistics.median(between), 1000 * cpu / count)


@contextmanager
def supervised(overrides: Sequence[str], place: Path) -> Iterator[Server]:
    """`serve.py`, ready."""
    begin = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "serve.py"), *overrides], cwd=place, stdout=subprocess.PIPE, text=True
    )
    try:
        line = next((line for line in process.stdout or () if "is ready" in line), None)
        assert line is not None, f"{process.wait()}: see {place}"
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        api_server = int(children[0]) if "serving=vllm" in overrides else process.pid  # LitServe's answers itself
        yield Server(int(line.rpartition(":")[2].partition("/")[0]), api_server, time.perf_counter() - begin)
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait()


@contextmanager
def bare(config: ServeConfig, place: Path) -> Iterator[Server]:
    """vLLM without us, after its first token."""
    serving = config.serving
    assert isinstance(serving, VLLMServing)
    served, directory = served_model(config)
    port = port_on("127.0.0.1", 0)
    given = arguments(served, directory, serving, config.infra, port)
    for option in GUARDED:
        where = given.index(option)
        del given[where : where + 2]
    begin = time.perf_counter()
    with (place / "bare.log").open("w") as log:
        process = subprocess.Popen(
            [str(interpreter(serving)), "-m", MODULE, *given],
            env=environment(served, serving, config.infra, place), stdout=log, stderr=log, start_new_session=True,
        )  # fmt: skip
    try:
        warm = {"model": "bench", "prompt": [0, 0], "max_tokens": 1, "stream": True}
        while True:
            try:
                asyncio.run(stream(port, warm))
                break
            except (OSError, AssertionError):
                assert process.poll() is None, (place / "bare.log").read_text()[-3000:]
                time.sleep(0.1)
        yield Server(port, process.pid, time.perf_counter() - begin)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def guard_alone(tokens: int) -> float:
    """Microseconds of CPU that the guard adds to a streamed request of 512 ids and so many tokens."""
    settings = {"model": "m", "draining": "/absent", "max_body_bytes": 2**20, "max_in_flight": 1,
                "default_max_tokens": 1, "progress_seconds": 1}  # fmt: skip
    os.environ[vllm_guard.SETTINGS] = json.dumps(settings)
    choice = {"index": 0, "text": "ab", "logprobs": None, "finish_reason": None, "token_ids": None}
    answer = {"id": "cmpl-b4180cc63c6f4c30", "object": "text_completion", "created": 1, "choices": [choice]}
    piece = b"data: " + json.dumps(answer, separators=(",", ":")).encode() + b"\n\n"
    head = {"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/event-stream")]}
    body = json.dumps({"model": "m", "prompt": list(range(512)), "max_tokens": tokens, "stream": True}).encode()

    async def nothing(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await send(head)
        for _ in range(tokens):
            await send({"type": "http.response.body", "body": piece, "more_body": True})
        await send({"type": "http.response.body", "body": b"data: [DONE]\n\n", "more_body": False})

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(message: dict[str, Any]) -> None:
        pass

    async def cpu_us(app: Any) -> float:
        begin = time.process_time()
        for _ in range(300):
            await app({"type": "http", "method": "POST", "path": "/v1/completions"}, receive, send)
        return 1e6 * (time.process_time() - begin) / 300

    async def rounds() -> float:
        guard = vllm_guard.Guard(nothing, CollectorRegistry())
        return statistics.median([await cpu_us(guard) - await cpu_us(nothing) for _ in range(9)])

    return asyncio.run(rounds())


def row(concurrent: int, ours: list[Seen], theirs: list[Seen]) -> list[str]:
    def both(name: str) -> str:
        return " / ".join(f"{statistics.median(getattr(one, name) for one in seen):.4g}" for seen in (ours, theirs))

    ratios = [our.requests_per_second / their.requests_per_second for our, their in zip(ours, theirs, strict=True)]
    spread = f"**{statistics.median(ratios):.3f}** ({min(ratios):.3f} to {max(ratios):.3f})"
    return [str(concurrent), both("requests_per_second"), spread, both("first_token_ms"), both("between_tokens_ms"),
            both("cpu_ms_per_request")]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, nargs="?")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--infra", default="local_cpu")
    parser.add_argument("--concurrent", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--requests", type=int, default=32, help="of a round, at least as many as are concurrent")
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--start", action="store_true", help="say start to first token too")
    parser.add_argument("--guard", action="store_true", help="the guard alone, and nothing else")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="settings of serve.py")
    chosen = parser.parse_intermixed_args()
    if chosen.guard:
        one, many = guard_alone(1), guard_alone(1001)
        print(f"the guard adds {one:.0f} us of CPU to a request and {(many - one) / 1000:.2f} us to each of its tokens")
        return
    if chosen.model is None:
        parser.error("name a model's directory, or --guard")
    chosen.vocabulary = json.loads((chosen.model / "config.json").read_text())["vocab_size"]
    most = max(chosen.concurrent)
    overrides = [
        f"run={chosen.model.resolve()}", "serving=vllm", "serving.port=0", "serving.name=bench", "tracking=none",
        f"infra={chosen.infra}", f"serving.max_sequences={most}", "serving.kv_cache_gib=1", *chosen.overrides,
    ]  # fmt: skip
    config = Composer((), "serve", root=ServeConfig).check(overrides).good()
    seen: dict[int, tuple[list[Seen], list[Seen]]] = {concurrent: ([], []) for concurrent in chosen.concurrent}
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        with supervised(overrides, place) as our, bare(config, place) as their:
            for number in range(chosen.rounds + 1):
                for concurrent, (ours, theirs) in seen.items():
                    turns = [(our, ours), (their, theirs)]
                    for server, found in turns if number % 2 else reversed(turns):
                        time.sleep(REST_S)
                        one = asyncio.run(load(server, chosen, concurrent, number))
                        if number:  # the first round warms up
                            found.append(one)
    head = ["concurrent", "requests/s, ours / bare", "ratio (range)", "first token, ms", "between tokens, ms",
            "API server, CPU ms a request"]  # fmt: skip
    print(table([head, *(row(concurrent, *both) for concurrent, both in seen.items())]))
    if chosen.start:
        print(f"start to first token: {our.start_s:.1f} s under supervision, {their.start_s:.1f} s bare (not at once)")
    results = {
        f"vllm {concurrent}": {"ours": [vars(one) for one in ours], "theirs": [vars(one) for one in theirs]}
        for concurrent, (ours, theirs) in seen.items()
    }
    save(chosen.json, results)


if __name__ == "__main__":
    main()
