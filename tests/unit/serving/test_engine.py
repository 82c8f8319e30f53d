"""Continuous batching: each job gets what it gets alone, whoever comes, goes or fails beside it."""

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_models import CONTEXT, VOCABULARY, generated, reference

from llmtrain.errors import EngineFailed, RequestRefused
from llmtrain.serving import engine as engine_module
from llmtrain.serving import torch_runtime
from llmtrain.serving.engine import Engine
from llmtrain.serving.jobs import Choosing, Failed, Job, Piece
from llmtrain.serving.runtime import Runtime

GREEDY = Choosing(temperature=0.0)


@pytest.fixture(scope="module")
def runtime(qwen3_directory: Path) -> Runtime:
    return torch_runtime.load(
        qwen3_directory, device="cpu", precision="fp32", max_sequences=3, context_tokens=CONTEXT, threads=1
    )


@pytest.fixture
def engine(runtime: Runtime, bpe: Any):
    engine = Engine(runtime, bpe, prefill_tokens=8)
    yield engine
    for slot in range(runtime.max_sequences):
        runtime.drop(slot)


def ids_of(number: int, seed: int = 0) -> tuple[int, ...]:
    return tuple(np.random.default_rng(seed).integers(VOCABULARY, size=number).tolist())


def job(length: int, seed: int = 0, **changes) -> Job:
    return Job(ids_of(length, seed), **{"max_tokens": 12, "choosing": GREEDY} | changes)


class Heard:
    """What came of each job."""

    def __init__(self) -> None:
        self.pieces: dict[str, list[Piece]] = {}
        self.failed: dict[str, Exception] = {}

    def hear(self, said: Iterable[Piece | Failed]) -> None:
        for one in said:
            if isinstance(one, Failed):
                self.failed[one.key] = one.error
            else:
                self.pieces.setdefault(one.key, []).append(one)

    def ids(self, key: str) -> list[int]:
        return [token for piece in self.pieces[key] for token in piece.token_ids]

    def text(self, key: str) -> str:
        return "".join(piece.text for piece in self.pieces[key])

    def reason(self, key: str) -> str | None:
        *before, last = self.pieces[key]
        assert all(piece.finish_reason is None for piece in before)
        return last.finish_reason


def run(engine: Engine, jobs: dict[str, Job], heard: Heard | None = None) -> Heard:
    """Add all, and step until there is nothing to do."""
    heard = heard or Heard()
    for key, one in jobs.items():
        engine.add(key, one)
    for _ in range(1000):
        if engine.is_idle:
            return heard
        said = engine.step()
        assert len({one.key for one in said}) == len(said), "one piece of a job a step"
        heard.hear(said)
    raise AssertionError("the engine does not end")


SEEDED = Choosing(temperature=1.3, top_p=0.95, seed=5, frequency_penalty=0.2)
JOBS = {
    "long": job(60, 1),
    "short": job(3, 2, max_tokens=30),
    "seeded": job(20, 3, choosing=SEEDED),
    "seeded otherwise": job(20, 3, choosing=replace(SEEDED, seed=6)),
    "one": job(1, 4, max_tokens=1),
    "again": job(3, 2, max_tokens=30),
    "last": job(33, 5, logprobs=2),
}


def test_jobs_together_get_the_tokens_that_each_gets_alone(engine: Engine):
    together = run(engine, JOBS)  # seven in three slots, prompts in chunks of 8 tokens
    for key, one in JOBS.items():
        alone = run(engine, {key: one})
        assert together.ids(key) == alone.ids(key)
        assert together.text(key) == alone.text(key)
        assert (together.reason(key), len(together.ids(key))) == ("length", one.max_tokens)
    assert together.ids("seeded") != together.ids("seeded otherwise")
    assert engine.tokens_fed == 2 * sum(len(one.ids) for one in JOBS.values())
    assert engine.tokens_generated == 2 * sum(one.max_tokens for one in JOBS.values())


def test_greedy_tokens_are_those_of_transformers_and_text_is_theirs(engine: Engine, qwen3_directory: Path, bpe: Any):
    jobs = {str(length): job(length, length) for length in (5, 40, 17, 1)}
    heard = run(engine, jobs)
    for key, one in jobs.items():
        assert heard.ids(key) == generated(qwen3_directory, list(one.ids), 12)
        assert heard.text(key) == bpe.decode(heard.ids(key), skip_special_tokens=True)


def test_a_seedless_job_is_another_each_time(engine: Engine):
    jobs = {str(number): job(5, choosing=Choosing()) for number in range(3)}
    heard = run(engine, jobs)
    assert len({tuple(heard.ids(key)) for key in jobs}) == 3


def test_a_long_prompt_does_not_hold_up_the_others(engine: Engine):
    engine.add("short", job(4, max_tokens=40))
    engine.step()
    engine.add("long", job(80))
    for count in range(9):  # 8 tokens a step, ten steps in all
        said = engine.step()
        assert [(one.key, len(one.token_ids)) for one in said] == [("short", 1)]
        assert engine.tokens_fed == 4 + 8 * (count + 1)
    assert {one.key for one in engine.step()} == {"short", "long"}


def test_prompts_are_fed_oldest_first_within_the_budget(engine: Engine):
    for key in ("a", "b", "c"):
        engine.add(key, job(6))
    assert [one.key for one in engine.step()] == ["a"]  # all of a, 2 tokens of b
    assert (engine.tokens_fed, engine.running, engine.waiting) == (8, 3, 0)
    assert [one.key for one in engine.step()] == ["b", "a"]  # 4 of b, 4 of c
    assert {one.key for one in engine.step()} == {"a", "b", "c"}


def test_room_and_counters(engine: Engine):
    assert (engine.is_idle, engine.has_room, engine.step()) == (True, True, [])
    before = engine.last_progress_monotonic
    for number in range(4):
        assert engine.has_room == (number < 3)
        engine.add(str(number), job(4))
    assert (engine.running, engine.waiting, engine.is_idle) == (0, 4, False)
    assert engine.last_progress_monotonic == before
    engine.step()
    assert (engine.running, engine.waiting) == (3, 1)
    assert engine.last_progress_monotonic > before


@pytest.mark.parametrize("when", ["waiting", "feeding", "running"])
def test_a_cancelled_job_frees_its_slot_and_the_others_go_on(engine: Engine, when: str):
    jobs = {"first": job(5, 1, max_tokens=30), "gone": job(30, 2), "other": job(9, 3)}
    expected = {key: run(engine, {key: one}).ids(key) for key, one in jobs.items()}
    heard = Heard()
    for key, one in jobs.items():
        engine.add(key, one)
    for _ in range({"waiting": 0, "feeding": 2, "running": 8}[when]):
        heard.hear(engine.step())
    assert ("gone" in heard.pieces) == (when == "running")
    last = engine.cancel("gone")
    assert last is not None
    assert (last.key, last.finish_reason, last.token_ids) == ("gone", "cancelled", ())
    assert engine.cancel("gone") is None
    assert engine.has_room
    run(engine, {"next": jobs["gone"]}, heard)
    assert heard.ids("next") == expected["gone"]
    assert (heard.ids("first"), heard.ids("other")) == (expected["first"], expected["other"])
    assert "gone" not in heard.pieces or heard.ids("gone") == expected["gone"][: len(heard.ids("gone"))]


def test_the_text_that_a_cancelled_job_held_back_comes_with_its_last_piece(engine: Engine, bpe: Any):
    expected = run(engine, {"a": job(5)})
    shown = expected.text("a")[:1]
    engine.add("b", job(5, stops=(shown + "never",)))
    assert next(iter(engine.step())).text == ""
    last = engine.cancel("b")
    assert last is not None
    assert last.text.startswith(shown)


def test_a_stop_token_ends_the_answer_and_its_text_is_not_part_of_it(engine: Engine, bpe: Any):
    whole = run(engine, {"a": job(5)})
    stop = whole.ids("a")[4]
    first = whole.ids("a").index(stop)
    heard = run(engine, {"a": job(5, stop_ids=frozenset({stop})), "b": job(5)})
    assert heard.ids("a") == whole.ids("a")[: first + 1]
    assert heard.text("a") == bpe.decode(whole.ids("a")[:first], skip_special_tokens=True)
    assert heard.reason("a") == "stop"
    assert (heard.ids("b"), heard.reason("b")) == (whole.ids("a"), "length"), "without stop ids none ends it"


def test_a_stop_text_may_span_tokens_and_is_not_part_of_the_answer(engine: Engine):
    jobs = {"a": job(8, 7, max_tokens=20)}
    whole = run(engine, jobs)
    ends = np.cumsum([len(piece.text) for piece in whole.pieces["a"]])
    middle = int(ends[9])
    stop = whole.text("a")[middle - 2 : middle + 2]
    at = whole.text("a").index(stop)
    heard = run(engine, {"a": replace(jobs["a"], stops=("no such text", stop))})
    assert heard.text("a") == whole.text("a")[:at]
    assert heard.reason("a") == "stop"
    assert len(heard.ids("a")) < 20
    assert heard.ids("a") == whole.ids("a")[: len(heard.ids("a"))]


def test_logprobs_of_the_answer_are_transformers(engine: Engine, qwen3_directory: Path):
    choosing = Choosing(temperature=2.0, top_k=3, seed=1, presence_penalty=1.0, logit_bias={7: 3.0})
    heard = run(engine, {"a": job(9, choosing=choosing, logprobs=2), "b": job(9)})
    ids = heard.ids("a")
    expected = reference(qwen3_directory, [*ids_of(9), *ids])[8:-1]
    said = [one for piece in heard.pieces["a"] for one in piece.logprobs]
    assert [one.id for one in said] == ids
    for one, row in zip(said, expected, strict=True):
        assert one.logprob == pytest.approx(row[one.id], abs=1e-5)
        assert one.rank == (row > row[one.id]).sum() + 1
        assert [token for token, _ in one.top] == np.argsort(-row)[:2].tolist()
    assert all(piece.logprobs == () for piece in heard.pieces["b"])


@pytest.mark.parametrize("most", [3, 128])
def test_logprobs_of_a_prompt_are_transformers_across_chunks(
    engine: Engine, qwen3_directory: Path, monkeypatch: pytest.MonkeyPatch, most: int
):
    monkeypatch.setattr(engine_module, "SCORED_TOKENS", most)
    ids = ids_of(45)
    heard = run(engine, {"a": job(45, prompt_logprobs=1, max_tokens=2), "b": job(30), "one": job(1, prompt_logprobs=0)})
    first, *others = heard.pieces["a"]
    assert first.prompt_logprobs is not None
    assert [one.id for one in first.prompt_logprobs] == list(ids[1:])
    expected = reference(qwen3_directory, list(ids))
    found = np.array([one.logprob for one in first.prompt_logprobs])
    assert np.abs(found - expected[np.arange(44), ids[1:]]).max() <= 1e-5
    assert [one.top[0][0] for one in first.prompt_logprobs] == expected[:-1].argmax(axis=1).tolist()
    assert all(piece.prompt_logprobs is None for piece in (*others, *heard.pieces["b"]))
    assert heard.pieces["one"][0].prompt_logprobs == ()


class Faulty:
    """A runtime that fails wherever the token 13 is."""

    def __init__(self, runtime: Runtime) -> None:
        self.runtime, self.vocab_size = runtime, runtime.vocab_size
        self.context_tokens, self.max_sequences = runtime.context_tokens, runtime.max_sequences
        self.drop = runtime.drop

    def feed_each(self, parts):
        if any(13 in ids for _, ids, _ in parts):
            raise RuntimeError("13 is fed")
        return self.runtime.feed_each(parts)

    def step(self, slots, ids):
        if 13 in ids:
            raise RuntimeError("13 is stepped")
        return self.runtime.step(slots, ids)


def test_a_failing_job_leaves_the_others_whole(engine: Engine, runtime: Runtime, bpe: Any):
    prompt = tuple(token for token in ids_of(40, 8) if token != 13)
    fine = {key: Job(prompt[:length], 20, replace(GREEDY, logit_bias={13: -100.0})) for key, length in
            (("a", 20), ("b", 7))}  # fmt: skip
    expected = {key: run(engine, {key: one}).ids(key) for key, one in fine.items()}
    faulty = Engine(Faulty(runtime), bpe, prefill_tokens=8)
    heard = run(faulty, {
        "a": fine["a"],
        "fed": Job((1, 2, 13), 5, GREEDY),
        "stepped": Job(prompt[:3], 5, replace(GREEDY, logit_bias={13: 100.0})),
        "chosen": Job(prompt[:3], 5, replace(GREEDY, logit_bias={3: float("nan")})),
        "b": fine["b"],
    })  # fmt: skip
    assert {key: heard.ids(key) for key in fine} == expected
    assert {key: str(error) for key, error in heard.failed.items()} == {
        "fed": "13 is fed",
        "stepped": "13 is stepped",
        "chosen": "the model gives logits that are not finite: its weights are damaged, or it diverged",
    }
    assert isinstance(heard.failed["chosen"], EngineFailed)
    assert (faulty.is_idle, faulty.has_room) == (True, True)


@pytest.mark.parametrize(
    ("wrong", "code", "message"),
    [
        (Job((), 1), "empty_prompt", "has no token"),
        (Job((1,) * 250, 7), "context_length_exceeded", "lower max_tokens to 6"),
        (Job((1,) * 300, 1), "context_length_exceeded", "shorten it to 255 at most"),
        (Job((1, VOCABULARY), 1), "unknown_token", "no token 512: ids go from 0 to 511"),
        (Job((-1,), 1), "unknown_token", "no token -1"),
        (Job((1,), 1, Choosing(logit_bias={999: 1.0})), "unknown_token", "no token 999"),
        (Job((1,), 1, stops=("a", "")), "empty_stop", "leave it out"),
    ],
)
def test_what_the_model_cannot_do_is_refused(engine: Engine, wrong: Job, code: str, message: str):
    with pytest.raises(RequestRefused, match=message) as refused:
        engine.add("a", wrong)
    assert (refused.value.status, refused.value.code) == (400, code)
    assert engine.is_idle


def test_a_job_that_fills_the_context_is_taken(engine: Engine):
    heard = run(engine, {"a": job(CONTEXT - 4, max_tokens=4)})
    assert len(heard.ids("a")) == 4
