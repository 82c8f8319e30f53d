"""A server as a supervised child: ready, watched, drained, and gone with all that it started.

One process, no restarts: an orchestrator restarts what ends, and knows better how often. Linux and macOS; a child that
makes a process group of its own for its children would escape (vLLM does not).
"""

import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llmtrain.client.client import Client
from llmtrain.errors import EngineFailed, LLMTrainError, TryAgain

POLL_S = 0.1
HEAR_S = 60.0
"""Between two times that somebody is told its metrics."""
ASK_S = 2.0
"""Longest wait for the child's word on how it is."""
END_S = 15.0
"""For the child to end by itself after SIGTERM, before it is killed: time to remove its shared memory."""
LAST_LINES = 15
LAST_BYTES = 2**20
"""So much of a log is looked at."""
ENDS_WITH_ITS_PARENT = 'exec 3<&0 </dev/null; (read x <&3; kill -KILL -$$) & exec 3<&-; exec "$@"'
"""Shell: a bystander in the child's process group reads a pipe that only we write to. However we end, SIGKILL too, it
sees the end of the pipe and kills the group. `exec` keeps the pid."""
NOISE = re.compile(r"nanobind: | - (leaked|\.\.\. skipped)")
"""What libraries of vLLM print at every end."""
CAUSE = re.compile(r"(^|\s)[\w.]*(Error|Exception): \S")


@dataclass(frozen=True)
class Child:
    """What is run, and how one talks to it."""

    name: str
    """What messages call it."""
    command: tuple[str, ...]
    environment: Mapping[str, str]
    """All of it; nothing of ours is added."""
    log: Path
    """Its stdout and stderr are appended there."""
    url: str
    """Where it answers `/health` with 200 once it is ready; `/metrics` has the gauge `in_flight`."""
    draining: Path
    """A file that is not there; made when no new request may begin."""
    in_flight: str
    """Prometheus' name of the requests that are not answered to the end."""
    start_seconds: float
    drain_seconds: float


@dataclass
class Asked:
    """The signals that have come: the first asks for an end, the second for one at once."""

    signals: list[int] = field(default_factory=list)


def supervise(child: Child, say: Callable[[str], None], hear: Callable[[str], None]) -> int:
    """Run it until SIGTERM or SIGINT, drain it, end its process group; returns the exit code.

    0: all requests were answered. 75: some were still under way after `drain_seconds`, or a second signal came. `hear`
    is given its `/metrics` once a minute and at the end. Raises EngineFailed, with its last lines, where it ends by
    itself or is not ready after `start_seconds`. One at a time, in the main thread, which signals go to.
    """
    child.log.parent.mkdir(parents=True, exist_ok=True)
    with child.log.open("ab") as log, Client(child.url, timeout_s=ASK_S) as client, signals() as asked:
        begin = log.seek(0, os.SEEK_END)
        process = subprocess.Popen(
            ["/bin/sh", "-c", ENDS_WITH_ITS_PARENT, "sh", *child.command],
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=log,
            env=dict(child.environment),
            start_new_session=True,
        )
        try:
            say(f"starting {child.name} (its log: {child.log})")
            start = time.monotonic()
            while not asked.signals and not is_ready(client):
                _still_runs(child, process, begin, "before it was ready")
                if time.monotonic() - start > child.start_seconds:
                    raise EngineFailed(
                        f"{child.name} is not ready after {child.start_seconds:g} s (serving.start_seconds)"
                        f"{last_words(child.log, begin)}"
                    )
                time.sleep(POLL_S)
            if asked.signals:
                say(f"{child.name} was stopped before it was ready")
                return 0
            say(f"{child.name} is ready after {time.monotonic() - start:.0f} s: {child.url}/v1")
            heard = time.monotonic()
            while not asked.signals:
                _still_runs(child, process, begin, "while it served")
                if time.monotonic() - heard > HEAR_S:
                    hear(metrics(client))
                    heard = time.monotonic()
                time.sleep(POLL_S)
            return _drain(child, client, process, asked, say, hear)
        finally:
            end_group(process)


@contextmanager
def signals() -> Iterator[Asked]:
    """Collect SIGTERM and SIGINT instead of ending by them."""
    asked = Asked()

    def note(number: int, frame: Any) -> None:
        asked.signals.append(number)

    before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def is_ready(client: Client) -> bool:
    with suppress(LLMTrainError):
        client.health()
        return True
    return False


def metrics(client: Client) -> str:
    """What it says of itself, in Prometheus' text format; empty where it does not answer."""
    with suppress(LLMTrainError):
        return client.metrics()
    return ""


def in_flight(child: Child, text: str) -> float:
    """Requests that are not answered to the end, by its metrics; infinity where they do not say."""
    values = [line.split()[1] for line in text.splitlines() if line.startswith(f"{child.in_flight} ")]
    return float(values[0]) if values else float("inf")


def end_group(process: subprocess.Popen[bytes]) -> None:
    """Kill what is left of the child's process group, and wait until nothing is."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    if process.stdin is not None:
        process.stdin.close()
    stop = time.monotonic() + END_S
    with suppress(ProcessLookupError):
        while time.monotonic() < stop:  # whoever inherited them has to ask for their ends
            os.killpg(process.pid, 0)
            time.sleep(POLL_S / 10)


def last_words(log: Path, begin: int) -> str:
    """The end of a message: what the log says from the byte `begin` on, the first error in its last MiB and its last
    lines."""
    with log.open("rb") as file:
        file.seek(max(begin, log.stat().st_size - LAST_BYTES))
        text = file.read().decode(errors="replace")
    lines = [line for line in text.splitlines() if line.strip() and not NOISE.match(line)]
    if not lines:
        return f"; {log} has nothing of it"
    cause = next((line for line in lines if CAUSE.search(line)), None)
    shown = lines[-LAST_LINES:]
    first = [f"first error: {cause.strip()}"] if cause and cause not in shown else []
    return "\n".join([f"; the last lines of {log}:", *first, *(f"  {line}" for line in shown)])


def _still_runs(child: Child, process: subprocess.Popen[bytes], begin: int, when: str) -> None:
    code = process.poll()
    if code is not None:
        how = f"by signal {-code}" if code < 0 else f"with exit code {code}"
        raise EngineFailed(f"{child.name} ended {how} {when}{last_words(child.log, begin)}")


def _drain(
    child: Child,
    client: Client,
    process: subprocess.Popen[bytes],
    asked: Asked,
    say: Callable[[str], None],
    hear: Callable[[str], None],
) -> int:
    """Let what is under way finish, then ask it to end."""
    child.draining.touch()
    stop = time.monotonic() + child.drain_seconds
    say(f"{child.name} takes no new requests; those under way have {child.drain_seconds:g} s (a second signal: none)")
    text = metrics(client)
    while in_flight(child, text) and time.monotonic() < stop and len(asked.signals) == 1 and process.poll() is None:
        time.sleep(POLL_S)
        text = metrics(client)
    left = in_flight(child, text)
    hear(text)
    process.terminate()
    with suppress(subprocess.TimeoutExpired):
        process.wait(END_S)
    if left:
        say(f"{child.name} ended; requests under way were cut short" + (f": {left:g}" if left < float("inf") else ""))
        return TryAgain.exit_code
    say(f"{child.name} ended; all requests were answered")
    return 0
