"""Who waits and who runs, what is counted, and when an engine is ill."""

import asyncio
import time
from collections.abc import Callable, Coroutine
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from llmtrain.serving.flights import Flight, Flights
from llmtrain.serving.health import Health
from llmtrain.serving.http_errors import Refused
from llmtrain.serving.jobs import Job, Piece
from llmtrain.serving.messages import Add, Cancel, Failure, Ready, Step, key_of
from llmtrain.serving.metrics import endpoint_of

JOB = Job(ids=(5, 6, 7), max_tokens=4)
Sent = list[tuple[str, Add | Cancel]]


def in_loop(work: Callable[[], Coroutine[Any, Any, None]]) -> Callable[[], None]:
    def run() -> None:
        asyncio.run(work())

    run.__name__ = work.__name__
    return run


def flights(max_sequences: int, max_waiting: int) -> tuple[Flights, Sent]:
    sent: Sent = []
    found = Flights(lambda uid, message: sent.append((uid, message)), max_sequences, max_waiting)
    found.take(Ready(vocab_size=400, context_tokens=100))
    found.open()
    return found, sent


def step(*pieces: Piece, started: tuple[str, ...] = (), failures: tuple[Failure, ...] = (), computed: int = 0) -> Step:
    return Step(tuple((key, time.monotonic()) for key in started), pieces, failures, computed)


def piece(flight: Flight, index: int, *, last: bool) -> Piece:
    return Piece(key_of(flight.uid, index), "a", (9,), finish_reason="stop" if last else None)


def value(found: Flights, name: str) -> float:
    families = text_string_to_metric_families(found.metrics.text().decode())
    return sum(sample.value for family in families for sample in family.samples if sample.name == f"llmtrain_{name}")


@in_loop
async def test_requests_wait_when_there_are_no_places() -> None:
    """Two places; a request of three sequences takes both, and one that waits is told from one that may not."""
    found, _ = flights(2, 1)
    with found.flight((JOB,) * 3) as first:
        assert (found.num_running, found.num_waiting) == (0, 0)  # it gets its places at once
        found.take(step(started=(key_of(first.uid, 0), key_of(first.uid, 1))))
        assert (found.num_running, found.num_waiting) == (1, 0)
        with found.flight((JOB,)):
            assert found.num_waiting == 1
            with pytest.raises(Refused) as refused, found.flight((JOB,)):
                pass
            assert (refused.value.status, refused.value.code) == (429, "queue_full")
            found.take(step(piece(first, 0, last=True), piece(first, 1, last=True)))
            assert found.num_waiting == 0  # the first's third sequence takes a place, the second request the other
            with found.flight((JOB,)):
                assert found.num_waiting == 1


@in_loop
async def test_no_request_is_refused_while_there_are_places() -> None:
    found, _ = flights(2, 0)
    with found.flight((JOB,)), found.flight((JOB,)), pytest.raises(Refused), found.flight((JOB,)):
        pass


@in_loop
async def test_what_is_left_unfinished_is_cancelled_and_only_that() -> None:
    found, sent = flights(4, 4)
    with found.flight((JOB, JOB)) as left:
        found.take(step(piece(left, 0, last=True)))
    with found.flight((JOB,)) as finished:
        found.take(step(piece(finished, 0, last=True)))
    assert sent == [(left.uid, Add((JOB, JOB))), (left.uid, Cancel(2)), (finished.uid, Add((JOB,)))]
    found.take(step(piece(left, 1, last=False)))  # computed before the engine heard of it: counted, and nobody's
    assert value(found, "generation_tokens_total") == 3


@in_loop
async def test_a_failure_ends_a_request_and_three_make_the_engine_ill() -> None:
    found, _ = flights(4, 4)
    for number in range(3):
        with found.flight((JOB, JOB)) as flight:
            failure = Failure(key_of(flight.uid, 0), "no memory", 500, "engine_failed")
            found.take(step(piece(flight, 1, last=False), failures=(failure,)))
            assert await told(flight) == [1, "no memory"]
        assert (found.health.num_failures, value(found, "failed_total")) == (1, number + 1)
    found.take(step(failures=(failure, failure)))
    fault = found.health.fault(time.monotonic(), has_work=False, progress_seconds=60)
    assert fault == "the engine failed the last 3 requests"
    found.take(step(piece(flight, 1, last=False)))
    assert found.health.fault(time.monotonic(), has_work=False, progress_seconds=60) is None


async def told(flight: Flight) -> list[int | str]:
    """Numbers of the jobs that went on, and how the request failed."""
    found: list[int | str] = []
    try:
        async for index, _ in flight.pieces():
            found.append(index)
    except Refused as refused:
        found.append(refused.message)
    return found


@in_loop
async def test_an_end_reaches_everybody_who_waits() -> None:
    found, _ = flights(1, 4)
    with found.flight((JOB,)) as first, found.flight((JOB,)) as second:
        found.end_all("the engine ended")
        for flight in (first, second):
            with pytest.raises(Refused, match="the engine ended") as refused:
                await anext(flight.pieces())
            assert refused.value.status == 503
    with pytest.raises(Refused, match="the engine ended"), found.flight((JOB,)):
        pass


@in_loop
async def test_times_and_tokens_are_counted_once() -> None:
    found, _ = flights(4, 4)
    with found.flight((JOB, JOB)) as flight:
        found.take(step(started=(key_of(flight.uid, 0), key_of(flight.uid, 1))))
        for last in (False, False, True):
            found.take(step(piece(flight, 0, last=last), piece(flight, 1, last=last)))
    counts = {
        name: value(found, name)
        for name in (
            "generation_tokens_total", "prompt_tokens_total", "request_queue_time_seconds_count",
            "time_to_first_token_seconds_count", "inter_token_latency_seconds_count",
            "e2e_request_latency_seconds_count",
        )
    }  # fmt: skip
    assert list(counts.values()) == [6, 6, 1, 1, 4, 1]
    figures = found.metrics.figures()
    assert figures["serving/generation_tokens"] == 6
    assert figures["serving/inter_token_latency_seconds_mean"] == pytest.approx(
        value(found, "inter_token_latency_seconds_sum") / 4
    )
    assert "serving/num_requests_running" in figures


@pytest.mark.parametrize(
    ("has_work", "heard_s", "progress_s", "says"),
    [
        (True, 0, 9, None),
        (True, 0, 11, "no token was computed for 11 s, and requests wait for it"),
        (False, 0, 11, None),
        (False, 11, 11, "nothing was heard of the engine for 11 s"),
    ],
)
def test_progress_is_asked_of_an_engine_that_has_work(
    has_work: bool, heard_s: float, progress_s: float, says: str | None
) -> None:
    health = Health(last_heard=100.0 - heard_s, last_progress=100.0 - progress_s)
    assert health.fault(100.0, has_work=has_work, progress_seconds=10.0) == says


def test_progress_is_a_token_more_and_not_a_message() -> None:
    health = Health(last_heard=0.0, last_progress=0.0)
    health.heard(5.0, 7)
    health.heard(9.0, 7)
    assert (health.last_heard, health.last_progress) == (9.0, 5.0)


@pytest.mark.parametrize(
    ("path", "endpoint"),
    [
        ("/v1/models/a/b", "/v1/models"),
        ("/v1/completions", "/v1/completions"),
        ("/v1/x", "other"),
        ("/metricsx", "other"),
    ],
)
def test_labels_are_few(path: str, endpoint: str) -> None:
    assert endpoint_of(path) == endpoint
