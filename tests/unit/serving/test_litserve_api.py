"""The engine's process: what its loop hears and says, and that it does not outlive its parent."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from queue import Queue
from types import SimpleNamespace
from typing import Any

import pytest

from llmtrain.errors import UserError
from llmtrain.processes import started
from llmtrain.serving import torch_runtime
from llmtrain.serving.engine import Engine
from llmtrain.serving.jobs import Job
from llmtrain.serving.litserve_api import EngineLoop, Pipe, envelope
from llmtrain.serving.litserve_server import closing_socket, url_of
from llmtrain.serving.messages import Add, Cancel, Step, Stop, ToEngine

LONG = Job(ids=tuple(range(5, 40)), max_tokens=100)
SHORT = Job(ids=(5,), max_tokens=1)


class Driven:
    """A loop on a real engine with two places, fed 16 tokens of prompts a step."""

    def __init__(self, directory: Path, tokenizer: Any) -> None:
        runtime = torch_runtime.load(
            directory, device="cpu", precision="fp32", max_sequences=2, context_tokens=200, threads=1
        )
        self.engine = Engine(runtime, tokenizer, prefill_tokens=16)
        self.queue: Queue[Any] = Queue()
        self.receiving, sending = multiprocessing.Pipe(duplex=False)
        self.pipe, self.loop = Pipe(sending), EngineLoop()

    def run(self, *messages: tuple[str, ToEngine]) -> Step:
        for uid, message in messages:
            self.queue.put(envelope(uid, message))
        self.loop.run(SimpleNamespace(engine=self.engine), "cpu", 0, self.queue, self.pipe, {}, None)
        found: Step = self.receiving.recv()
        return found


@pytest.fixture
def driven(qwen3_directory: Path, bpe: Any) -> Driven:
    return Driven(qwen3_directory, bpe)


def test_a_step_says_who_started_what_is_new_and_how_much_was_computed(driven: Driven) -> None:
    before = time.monotonic()
    step = driven.run(("a", Add((SHORT, LONG))), ("b", Add((SHORT,))))
    assert [key for key, _ in step.started] == ["a/0", "a/1"]
    assert all(before <= at <= time.monotonic() for _, at in step.started)
    assert [(piece.key, piece.finish_reason) for piece in step.pieces] == [("a/0", "length")]
    assert step.tokens_computed == 16 + 1  # a prompt of one token, 15 of the long one, and an answer
    step = driven.run()
    assert [key for key, _ in step.started] == ["b/0"]
    assert step.tokens_computed == 2 * 16 + 1


def test_cancelled_requests_leave_the_queue_and_their_places(driven: Driven) -> None:
    driven.run(("a", Add((LONG, LONG))), ("b", Add((LONG,))), ("c", Add((SHORT,))))
    step = driven.run(("b", Cancel(1)), ("a", Cancel(2)))
    assert [key for key, _ in step.started] == ["c/0"]
    assert [piece.key for piece in step.pieces] == ["c/0"]
    assert driven.engine.is_idle


def test_jobs_that_the_engine_refuses_fail_alone(driven: Driven) -> None:
    step = driven.run(("a", Add((Job(ids=(5,), max_tokens=500), SHORT))))
    (failure,) = step.failures
    assert (failure.key, failure.status, failure.code) == ("a/0", 400, "context_length_exceeded")
    assert [piece.key for piece in step.pieces] == ["a/1"]


def test_an_idle_engine_says_that_it_is_there(driven: Driven) -> None:
    assert driven.run() == Step((), (), (), 0)


def test_the_last_message_ends_the_process(driven: Driven) -> None:
    with pytest.raises(SystemExit) as end:
        driven.run(("", Stop()))
    assert end.value.code == 0


def test_a_process_ends_with_its_killed_parent() -> None:
    child = "import os, time; from llmtrain.serving.litserve_api import end_with_parent as e; e(os.getppid())"
    parent = (
        "import subprocess, sys, time\n"
        f"child = subprocess.Popen([sys.executable, '-c', {child + '; print(0, flush=True); time.sleep(600)'!r}],"
        " stdout=subprocess.PIPE)\n"
        "child.stdout.readline(); print(child.pid, flush=True); time.sleep(600)"
    )
    with subprocess.Popen([sys.executable, "-c", parent], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        pid = int(process.stdout.readline())
        assert started(pid) is not None
        process.kill()
    stop = time.monotonic() + 30
    while started(pid) is not None:
        if time.monotonic() > stop:
            os.kill(pid, signal.SIGKILL)
            pytest.fail("it goes on")
        time.sleep(0.01)


def test_a_taken_port_is_a_mistake_of_the_user() -> None:
    with closing_socket("127.0.0.1", 0) as first:
        port = first.getsockname()[1]
        assert url_of(first) == f"http://127.0.0.1:{port}"
        with pytest.raises(UserError, match=r"serving\.port=0 for a free port"), closing_socket("127.0.0.1", port):
            pass
