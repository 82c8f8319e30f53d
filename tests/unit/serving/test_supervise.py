"""A supervised child is ready, drained, reported when it dies, and gone with its children whatever ends us."""

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from llmtrain.serving.supervise import last_words

SERVER = """
import os, signal, subprocess, sys, threading, time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

port, draining, mode = int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
grandchild = subprocess.Popen(["sleep", "600"])
print("grandchild", grandchild.pid, flush=True)
if mode == "dies":
    print("(Server pid=1) WARNING this can cause errors like `OSError: [Errno 24] Too many open files`", flush=True)
    print("(Server pid=1) ERROR 11-28 a.b.ValueError: no such dtype", flush=True)
    print("RuntimeError: initialization failed", flush=True)
    print("\\n".join(f"line {number}" for number in range(40)), flush=True)
    sys.exit(7)
in_flight = 0

class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        global in_flight
        status, body = 200, b"{}"
        if self.path == "/metrics":
            body = f"# HELP x\\nin_flight {in_flight}\\n".encode()
        elif self.path == "/health":
            status = 503 if mode == "never" else 200
        elif draining.exists():
            status = 503
        else:
            in_flight += 1
            time.sleep(float(self.path[1:]))
            in_flight -= 1
            body = b"whole"
        self.send_response(status)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        pass

server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
if mode == "stubborn":
    signal.signal(signal.SIGTERM, lambda *_: print("SIGTERM ignored", flush=True))
else:
    signal.signal(signal.SIGTERM, lambda *_: threading.Thread(target=server.shutdown).start())
server.serve_forever()
"""

SUPERVISOR = """
import json, os, sys
from pathlib import Path
from llmtrain.errors import LLMTrainError
from llmtrain.serving import supervise
from llmtrain.serving.supervise import Child

supervise.END_S = 0.5
given = json.loads(sys.argv[1])
child = Child(name="the engine", command=tuple(given["command"]), environment=dict(os.environ), log=Path(given["log"]),
              url=given["url"], draining=Path(given["draining"]), in_flight="in_flight",
              start_seconds=given["start_seconds"], drain_seconds=given["drain_seconds"])
try:
    code = supervise.supervise(
        child, lambda text: print(text, flush=True), lambda text: print("heard", text.split()[-1], flush=True)
    )
except LLMTrainError as error:
    print(error, flush=True)
    code = error.exit_code
sys.exit(code)
"""


class Supervisor:
    """A supervisor in a process of its own, with what it supervises."""

    def __init__(self, directory: Path, mode: str, start_seconds: float = 20, drain_seconds: float = 20) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        (directory / "server.py").write_text(SERVER)
        self.log = directory / "logs" / "engine.log"
        draining = str(directory / "draining")
        given = {
            "command": [sys.executable, str(directory / "server.py"), str(self.port), draining, mode],
            "log": str(self.log),
            "url": f"http://127.0.0.1:{self.port}",
            "draining": draining,
            "start_seconds": start_seconds,
            "drain_seconds": drain_seconds,
        }
        self.process = subprocess.Popen(
            [sys.executable, "-c", SUPERVISOR, json.dumps(given)], stdout=subprocess.PIPE, text=True
        )
        self.said: list[str] = []

    def wait_for(self, text: str) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.said.append(line.rstrip())
            if text in line:
                return
        raise AssertionError(f"it ended without saying {text!r}: {self.said}")

    def ends(self) -> int:
        assert self.process.stdout is not None
        self.said += [line.rstrip() for line in self.process.stdout]
        return self.process.wait(timeout=30)

    def get(self, path: str) -> tuple[int, bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        connection.request("GET", path)
        response = connection.getresponse()
        return response.status, response.read()

    def is_cut(self, path: str) -> None:
        with pytest.raises((OSError, http.client.HTTPException)):
            self.get(path)

    def is_refused(self) -> bool:
        """Whether nobody listens within some seconds: a killed process resets what it had queued before its port is
        free."""
        stop = time.monotonic() + 20
        while time.monotonic() < stop:
            try:
                self.get("/health")
            except ConnectionRefusedError:
                return True
            except (OSError, http.client.HTTPException):
                pass
            time.sleep(0.05)
        return False

    @property
    def grandchild(self) -> int:
        line = next(line for line in self.log.read_text().splitlines() if line.startswith("grandchild"))
        return int(line.split()[1])

    def leaves_nothing(self) -> bool:
        """Whether the grandchild, which holds nothing and knows nobody, ends within some seconds."""
        stop = time.monotonic() + 20
        while time.monotonic() < stop:
            try:
                state = Path(f"/proc/{self.grandchild}/stat").read_text().rpartition(")")[2].split()[0]
            except OSError:
                return True
            if state == "Z":  # dead; whoever inherited it has not asked yet
                return True
            time.sleep(0.05)
        os.kill(self.grandchild, signal.SIGKILL)
        return False


@pytest.fixture
def start(tmp_path: Path) -> Iterator[type[Supervisor]]:
    started: list[Supervisor] = []

    def make(mode: str, **limits: float) -> Supervisor:
        started.append(Supervisor(tmp_path, mode, **limits))
        return started[-1]

    yield make  # type: ignore[misc]
    for one in started:
        one.process.kill()
        one.process.wait()
        assert one.leaves_nothing()


def test_requests_under_way_finish_and_new_ones_are_refused(start):
    engine = start("works")
    engine.wait_for("is ready")
    answers: list[tuple[int, bytes]] = []
    slow = threading.Thread(target=lambda: answers.append(engine.get("/1.5")))
    slow.start()
    while b"in_flight 1" not in engine.get("/metrics")[1]:
        time.sleep(0.02)
    engine.process.send_signal(signal.SIGTERM)
    engine.wait_for("takes no new requests")
    assert engine.get("/0")[0] == 503
    slow.join()
    assert answers == [(200, b"whole")]
    assert engine.ends() == 0
    assert engine.said[-2:] == ["heard 0", "the engine ended; all requests were answered"]
    assert engine.leaves_nothing()


def test_what_takes_longer_than_the_drain_is_cut_short_and_said(start):
    engine = start("works", drain_seconds=0.3)
    engine.wait_for("is ready")
    threading.Thread(target=engine.is_cut, args=("/30",), daemon=True).start()
    while b"in_flight 1" not in engine.get("/metrics")[1]:
        time.sleep(0.02)
    engine.process.send_signal(signal.SIGINT)
    assert engine.ends() == 75
    assert engine.said[-1].endswith("requests under way were cut short: 1")


def test_a_second_signal_ends_the_drain(start):
    engine = start("works", drain_seconds=600)
    engine.wait_for("is ready")
    threading.Thread(target=engine.is_cut, args=("/30",), daemon=True).start()
    while b"in_flight 1" not in engine.get("/metrics")[1]:
        time.sleep(0.02)
    engine.process.send_signal(signal.SIGTERM)
    engine.wait_for("takes no new requests")
    engine.process.send_signal(signal.SIGTERM)
    assert engine.ends() == 75


def test_one_that_ignores_sigterm_is_killed(start):
    engine = start("stubborn")
    engine.wait_for("is ready")
    engine.process.send_signal(signal.SIGTERM)
    assert engine.ends() == 0
    assert "SIGTERM ignored" in engine.log.read_text()
    assert engine.leaves_nothing()


def test_death_at_the_start_shows_the_first_error_and_the_last_lines(start):
    engine = start("dies")
    assert engine.ends() == 3
    text = "\n".join(engine.said)
    assert "the engine ended with exit code 7 before it was ready" in text
    assert "first error: (Server pid=1) ERROR 11-28 a.b.ValueError: no such dtype" in text
    assert engine.said[-15:] == [f"  line {number}" for number in range(25, 40)]
    assert engine.leaves_nothing()  # it had ended before its child


def test_death_later_ends_the_supervisor_too(start):
    engine = start("works")
    engine.wait_for("is ready")
    children = Path(f"/proc/{engine.process.pid}/task/{engine.process.pid}/children").read_text().split()
    os.kill(int(children[0]), signal.SIGKILL)
    assert engine.ends() == 3
    assert any("the engine ended by signal 9 while it served" in line for line in engine.said)
    assert engine.leaves_nothing()


def test_one_that_is_never_ready_is_given_up(start):
    engine = start("never", start_seconds=1)
    assert engine.ends() == 3
    assert any("is not ready after 1 s (serving.start_seconds)" in line for line in engine.said)
    assert engine.leaves_nothing()


def test_a_signal_before_it_is_ready_ends_it(start):
    engine = start("never")
    engine.wait_for("starting")
    while not engine.log.read_text():
        time.sleep(0.02)
    engine.process.send_signal(signal.SIGTERM)
    assert engine.ends() == 0
    assert engine.leaves_nothing()


def test_a_supervisor_that_is_killed_leaves_nothing(start):
    engine = start("stubborn")
    engine.wait_for("is ready")
    engine.process.kill()
    assert engine.ends() == -signal.SIGKILL
    assert engine.leaves_nothing()
    assert engine.is_refused()


def test_last_words_are_of_this_start_only(tmp_path):
    log = tmp_path / "log"
    log.write_text("RuntimeError: of yesterday\n")
    begin = log.stat().st_size
    assert last_words(log, begin) == f"; {log} has nothing of it"
    with log.open("a") as file:
        file.write("one\n\ntwo\n")
    assert last_words(log, begin) == f"; the last lines of {log}:\n  one\n  two"
