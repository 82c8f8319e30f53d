"""LitServe with the engine in a process of its own: started, watched, drained and ended from the main thread.

LitServe's `run` has a manager's process, forks the HTTP server, leaves the engine behind when its parent is killed, and
ends with code 0 when the engine dies. Here the main process is the HTTP server, and the engine its only child.
"""

import asyncio
import multiprocessing
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import uvicorn

from llmtrain.artifacts import ServedModel
from llmtrain.config.infra import Infra
from llmtrain.config.serving import LitServeServing
from llmtrain.data.tokenizer import load_tokenizer
from llmtrain.errors import EngineFailed, TryAgain, UserError
from llmtrain.processes import importable
from llmtrain.serving.answers import Tokens
from llmtrain.serving.flights import Flights
from llmtrain.serving.http_app import Server
from llmtrain.serving.litserve_api import EngineAPI, Pipe, envelope
from llmtrain.serving.messages import Stop, ToEngine
from llmtrain.serving.openai_spec import OpenAISpec
from llmtrain.serving.reading import reader_of
from llmtrain.serving.served import serving_directory
from llmtrain.serving.supervise import last_words

Say = Callable[[str], None]
Track = Callable[[dict[str, float]], None]
STOPS = (signal.SIGTERM, signal.SIGINT)
TRACK_S = 60.0
LAST_ANSWERS_S = 2.0
"""For answers to reach their clients, and for the engine's process to end by itself."""


def serve_litserve(
    served: ServedModel,
    directory: Path,
    serving: LitServeServing,
    infra: Infra,
    outputs: Path,
    say: Say,
    track: Track,
) -> int:
    """Serve the model in `directory` until SIGTERM or Ctrl-C; `say` has the address when it is ready.

    Returns 0 where all requests were answered, 75 where some were still under way after `serving.drain_seconds` or a
    second signal came. `track` is told the counters once a minute and at the end. The engine's own output goes to
    `litserve.log` in the endpoint's directory. For the main thread, which signals go to. Raises UserError where the
    port is taken or the model cannot be served, EngineFailed where the engine ends by itself or is not ready in time.
    """
    log = serving_directory(served, outputs) / "litserve.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    with closing_socket(serving.host, serving.port) as listener:
        return asyncio.run(Endpoint(served, directory, serving, infra, log, say, track).serve(listener))


class Uvicorn(uvicorn.Server):
    """Signals are `Endpoint`'s affair."""

    def capture_signals(self) -> Any:
        return nullcontext()


class Endpoint:
    """One life of an endpoint."""

    def __init__(
        self,
        served: ServedModel,
        directory: Path,
        serving: LitServeServing,
        infra: Infra,
        log: Path,
        say: Say,
        track: Track,
    ) -> None:
        self._served, self._directory, self._serving = served, directory, serving
        self._log, self._say, self._track = log, say, track
        self._log_begins = log.stat().st_size if log.exists() else 0
        self._pipe = Pipe.new()
        self._queue = multiprocessing.get_context("spawn").Queue()
        self._spec = OpenAISpec(served, serving)
        api = EngineAPI(served, directory, serving, infra, log, self._pipe, self._spec)
        self._server = Server(api, self._spec, infra.accelerator, self._pipe, self._queue)
        self._api = api
        self._num_signals = 0
        self._stopping = asyncio.Event()

    async def serve(self, listener: socket.socket) -> int:
        """See `serve_litserve`."""
        self._flights = self._spec.flights = Flights(self._send, self._serving.max_sequences, self._serving.max_waiting)
        with importable(), unheard(STOPS):
            (self._engine,) = self._server.launch_inference_worker(self._api)
        for number in STOPS:
            asyncio.get_running_loop().add_signal_handler(number, self._stop)
        self._pipe.listen()
        config = uvicorn.Config(
            self._server.app, log_level="error", access_log=False, server_header=False, ws="none",
            timeout_graceful_shutdown=int(LAST_ANSWERS_S),
        )  # fmt: skip
        http = Uvicorn(config)
        answering = asyncio.create_task(http.serve(sockets=[listener]))
        hearing = asyncio.create_task(self._hear())
        tracking = asyncio.create_task(self._tell())
        try:
            return await self._life(hearing, url_of(listener))
        finally:
            tracking.cancel()
            self._flights.end_all("the endpoint is ending")
            http.should_exit = True
            await answering
            self._track(self._flights.metrics.figures())
            await asyncio.to_thread(self._end_engine)
            await first_of(hearing, timeout=LAST_ANSWERS_S)
            hearing.cancel()
            await asyncio.gather(hearing, tracking, return_exceptions=True)

    async def _life(self, hearing: asyncio.Task[None], url: str) -> int:
        stopping = asyncio.create_task(self._stopping.wait())
        opening = asyncio.create_task(self._open())
        limit = self._serving.start_seconds
        await first_of(opening, hearing, stopping, timeout=limit)
        if hearing.done() and not self._flights.ready.done():
            raise self._engine_ended(hearing, "before it was ready")
        if stopping.done():
            self._say(f"{self._served.label} was stopped before it was ready")
            return 0
        if not opening.done() and not hearing.done():
            raise EngineFailed(
                f"{self._served.label} is not ready after {limit:g} s (serving.start_seconds)"
                f"{last_words(self._log, self._log_begins)}"
            )
        await opening
        self._say(f"{self._served.label} is ready: {url}/v1")
        await first_of(hearing, stopping)
        if hearing.done():
            raise self._engine_ended(hearing, "while it served")
        return await self._drain(hearing)

    async def _open(self) -> None:
        """Wait for the engine, and read the tokenizer meanwhile; then take requests."""
        ready, tokenizer = await asyncio.gather(self._flights.ready, asyncio.to_thread(load_tokenizer, self._directory))
        reader = reader_of(tokenizer, self._served, self._serving.default_max_tokens, ready.vocab_size)
        self._spec.open(reader, Tokens(tokenizer))
        self._flights.open()

    async def _hear(self) -> None:
        """What the engine says, until its process ends."""
        with suppress(EOFError):
            while True:
                self._flights.take(await self._pipe.areceive())

    def _engine_ended(self, hearing: asyncio.Task[None], when: str) -> EngineFailed:
        """Tells everybody who waits."""
        hearing.result()  # raises what was wrong with a message of the engine, if that is why
        self._engine.join(LAST_ANSWERS_S)
        code = self._engine.exitcode
        how = f"with exit code {code}" if code is None or code >= 0 else f"by signal {-code}"
        message = f"the engine ended {how} {when}"
        self._flights.health.ended = message
        self._flights.end_all(message)
        return EngineFailed(f"{self._served.label}: {message}{last_words(self._log, self._log_begins)}")

    async def _drain(self, hearing: asyncio.Task[None]) -> int:
        """Let what is under way finish."""
        seconds, flights = self._serving.drain_seconds, self._flights
        flights.close("the endpoint is ending and takes no new requests")
        self._say(f"takes no new requests; {flights.under_way} under way have {seconds:g} s (a second signal: none)")
        end = asyncio.get_running_loop().time() + seconds
        while flights.under_way and self._num_signals == 1 and asyncio.get_running_loop().time() < end:
            if hearing.done():
                raise self._engine_ended(hearing, "before all requests were answered")
            await asyncio.sleep(0.02)
        if flights.under_way:
            self._say(f"ended; requests that were cut short: {flights.under_way}")
            return TryAgain.exit_code
        self._say("ended; all requests were answered")
        return 0

    async def _tell(self) -> None:
        while True:
            await asyncio.sleep(TRACK_S)
            self._track(self._flights.metrics.figures())

    def _stop(self) -> None:
        self._num_signals += 1
        self._stopping.set()

    def _send(self, uid: str, message: ToEngine) -> None:
        self._queue.put(envelope(uid, message))

    def _end_engine(self) -> None:
        self._queue.put(envelope("", Stop()))
        self._engine.join(LAST_ANSWERS_S)
        self._engine.kill()  # nothing, where it has ended
        self._engine.join()
        self._queue.cancel_join_thread()  # nobody reads any more
        self._queue.close()


async def first_of(*tasks: asyncio.Task[Any], timeout: float | None = None) -> None:
    """Wait until one is done, or `timeout` seconds."""
    await asyncio.wait(tasks, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)


@contextmanager
def closing_socket(host: str, port: int) -> Iterator[socket.socket]:
    """A listening socket. Raises UserError where the address cannot be had."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        listener = socket.create_server((host, port), family=family)
    except OSError as error:
        raise UserError(
            f"cannot listen on {host}:{port} ({error.strerror or error}); set serving.port=0 for a free port, or stop "
            f"what listens there"
        ) from error
    with listener:
        yield listener


def url_of(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    reached = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)
    return f"http://{reached}:{port}"


@contextmanager
def unheard(signals: tuple[signal.Signals, ...]) -> Iterator[None]:
    """Processes that are started in the block ignore the signals: their parent hears them, and ends them."""
    before = {number: signal.signal(number, signal.SIG_IGN) for number in signals}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
