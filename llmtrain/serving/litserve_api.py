"""The engine's process: a LitAPI that has the engine, the loop that drives it, and the way back to the HTTP server.

Two things are not LitServe's. Its loop of continuous batching has a thread for each step and polls its queue; this one
takes what has come between two steps, cancellations too. And answers come through a pipe instead of a manager's queue,
which would be a third process: when the engine's process ends, however it ends, its pipe does, and that is noticed.
"""

import asyncio
import ctypes
import logging
import multiprocessing
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from http import HTTPStatus
from multiprocessing.connection import Connection
from pathlib import Path
from queue import Empty, Queue
from typing import TYPE_CHECKING, Any

from litserve import LitAPI
from litserve.loops import LitLoop
from litserve.transport.base import MessageTransport

from llmtrain.artifacts import ServedModel
from llmtrain.config.infra import Infra
from llmtrain.config.serving import LitServeServing
from llmtrain.errors import LLMTrainError, RequestRefused, RunFailed
from llmtrain.serving.jobs import Failed, Piece
from llmtrain.serving.messages import (
    Add,
    Cancel,
    Failure,
    FromEngine,
    NotReady,
    Ready,
    Step,
    Stop,
    ToEngine,
    key_of,
)

if TYPE_CHECKING:
    from llmtrain.serving.engine import Engine
    from llmtrain.serving.runtime import Runtime

Envelope = tuple[int, str, float, ToEngine]
IDLE_S = 1.0
"""An engine without work says so that often."""
PR_SET_PDEATHSIG = 1
logger = logging.getLogger(__name__)
PROVIDERS = {"cpu": ("CPUExecutionProvider",), "cuda": ("CUDAExecutionProvider", "CPUExecutionProvider")}


class Pipe(MessageTransport):
    """Messages from the engine's process, in order. Reading ends with EOFError when that process has ended."""

    def __init__(self, sending: Connection, receiving: Connection | None = None) -> None:
        self._sending, self._receiving = sending, receiving
        self._arrived: asyncio.Queue[FromEngine | None] = asyncio.Queue()

    @classmethod
    def new(cls) -> "Pipe":
        receiving, sending = multiprocessing.Pipe(duplex=False)
        return cls(sending, receiving)

    def __reduce__(self) -> tuple[Any, ...]:
        return Pipe, (self._sending,)

    def send(self, item: FromEngine, consumer_id: int = 0) -> None:
        self._sending.send(item)

    def listen(self) -> None:
        """In the server's process, once the engine's was started: read in a thread, since a pipe blocks."""
        self._sending.close()
        threading.Thread(target=self._read, args=(asyncio.get_running_loop(),), name="from-engine", daemon=True).start()

    async def areceive(self, timeout: int | None = None, consumer_id: int | None = None) -> FromEngine:
        message = await self._arrived.get()
        if message is None:
            raise EOFError("the engine's process has ended")
        return message

    def _read(self, loop: asyncio.AbstractEventLoop) -> None:
        assert self._receiving is not None, "only the server's end is read"
        with suppress(RuntimeError):  # the server's own end: its loop is closed
            while True:
                message: FromEngine | None
                try:
                    message = self._receiving.recv()
                except (EOFError, OSError):  # OSError: it ended in the middle of a message
                    message = None
                loop.call_soon_threadsafe(self._arrived.put_nowait, message)
                if message is None:
                    return


class EngineAPI(LitAPI):
    """Loads the model in the process that LitServe starts for it, and says through the pipe that it is ready."""

    def __init__(
        self,
        served: ServedModel,
        directory: Path,
        serving: LitServeServing,
        infra: Infra,
        log: Path,
        pipe: Pipe,
        spec: Any,
    ) -> None:
        super().__init__(spec=spec, loop=EngineLoop(), max_batch_size=serving.max_sequences)
        self._served, self._directory, self._serving, self._infra = served, directory, serving, infra
        self._log, self._pipe, self._parent = log, pipe, os.getpid()
        self.engine: Engine

    def setup(self, device: str) -> None:
        end_with_parent(self._parent)
        write_to(self._log)
        try:
            from llmtrain.data.tokenizer import load_tokenizer
            from llmtrain.serving.engine import Engine

            runtime, tokenizer = self._runtime(), load_tokenizer(self._directory)
            self.engine = Engine(runtime, tokenizer, prefill_tokens=self._serving.prefill_tokens)
        except LLMTrainError as error:
            self._pipe.send(NotReady(str(error), error.exit_code))
            raise SystemExit(error.exit_code) from error
        except Exception as error:  # of a library, whose errors the parent may not even be able to import
            logger.exception("the model is not loaded")
            message = f"{self._directory} is not loaded: {type(error).__name__}: {error}; {self._log} says where"
            self._pipe.send(NotReady(message, RunFailed.exit_code))
            raise SystemExit(RunFailed.exit_code) from error
        self._pipe.send(Ready(runtime.vocab_size, runtime.context_tokens))

    def _runtime(self) -> "Runtime":
        sizes = {"max_sequences": self._serving.max_sequences, "context_tokens": self._served.context_tokens}
        threads = self._infra.threads or len(os.sched_getaffinity(0))
        if self._served.form == "trained":
            from llmtrain.serving import torch_runtime

            return torch_runtime.load(
                self._directory,
                device=self._infra.accelerator,
                precision=self._served.precision,
                threads=threads,
                **sizes,
            )
        from llmtrain.serving import onnx_runtime

        return onnx_runtime.load(
            self._directory, providers=PROVIDERS[self._infra.accelerator], threads=threads, **sizes
        )


class EngineLoop(LitLoop):
    """Takes messages, lets the engine do a step, sends what is new; LitServe calls `run` again and again."""

    def __init__(self) -> None:
        super().__init__()
        self._waiting: deque[str] = deque()
        """Keys of jobs that the engine has given no place yet, in the order they came."""

    def run(
        self,
        lit_api: EngineAPI,
        device: str,
        worker_id: int,
        request_queue: "Queue[Envelope]",
        transport: Pipe,
        workers_setup_status: dict[str, str],
        callback_runner: Any,
    ) -> None:
        engine, failures = lit_api.engine, list[Failure]()
        for uid, message in arrived(request_queue, wait_s=IDLE_S if engine.is_idle else 0.0):
            failures += self._hear(engine, uid, message)
        began = time.monotonic()
        found = [] if engine.is_idle else engine.step()
        pieces = tuple(one for one in found if isinstance(one, Piece))
        failures += [failure_of(one.key, one.error) for one in found if isinstance(one, Failed)]
        started = [(self._waiting.popleft(), began) for _ in range(len(self._waiting) - engine.waiting)]
        tokens_computed = engine.tokens_fed + engine.tokens_generated
        transport.send(Step(tuple(started), pieces, tuple(failures), tokens_computed))

    def _hear(self, engine: "Engine", uid: str, message: ToEngine) -> list[Failure]:
        """Jobs that the engine refuses."""
        refused = []
        match message:
            case Stop():
                raise SystemExit(0)
            case Cancel(num_jobs):
                keys = {key_of(uid, index) for index in range(num_jobs)}
                for key in keys:
                    engine.cancel(key)
                self._waiting = deque(key for key in self._waiting if key not in keys)
            case Add(jobs):
                for index, job in enumerate(jobs):
                    key = key_of(uid, index)
                    try:
                        engine.add(key, job)
                        self._waiting.append(key)
                    except RequestRefused as error:
                        refused.append(failure_of(key, error))
        return refused


def envelope(uid: str, message: ToEngine) -> Envelope:
    """A message as LitServe's queues carry them: response queue, request, time, payload."""
    return 0, uid, time.monotonic(), message


def arrived(queue: "Queue[Envelope]", wait_s: float) -> Iterator[tuple[str, ToEngine]]:
    """What is in the queue; where nothing is, the first that comes within `wait_s` seconds."""
    try:
        found = queue.get(timeout=wait_s) if wait_s else queue.get_nowait()
        while True:
            yield found[1], found[3]
            found = queue.get_nowait()
    except Empty:
        return


def failure_of(key: str, error: Exception) -> Failure:
    if isinstance(error, RequestRefused):
        return Failure(key, str(error), error.status, error.code)
    logger.error("a request failed", exc_info=error)
    return Failure(key, f"the engine failed: {error}", HTTPStatus.INTERNAL_SERVER_ERROR, "engine_failed")


def end_with_parent(parent: int) -> None:
    """Have this process killed when `parent`, which started it, has ended, however it ended. Linux only."""
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it ended before
        os._exit(1)


def write_to(log: Path) -> None:
    """Append stdout and stderr of this process, and of libraries in it, to `log`."""
    with log.open("ab") as file:
        for descriptor in (1, 2):
            os.dup2(file.fileno(), descriptor)
