"""Continuous batching: many jobs on one runtime, each as if it were alone."""

import secrets
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

from llmtrain.errors import RequestRefused
from llmtrain.serving.jobs import Failed, FinishReason, Job, Piece, TokenLogprob
from llmtrain.serving.runtime import Logits, Runtime, Want
from llmtrain.serving.sampling import Row, choose, logprob
from llmtrain.serving.stopping import Detokeniser, StopTexts, Tokenizer

SCORED_TOKENS = 128
"""Most tokens of a prompt whose logits are held at a time: 78 MB for 151,936 columns."""


@dataclass(eq=False)
class _Sequence:
    """A job under way."""

    key: str
    job: Job
    detokeniser: Detokeniser
    stops: StopTexts
    seed: int
    slot: int = -1
    num_fed: int = 0
    """Tokens of the prompt."""
    prompt_logprobs: list[TokenLogprob] = field(default_factory=list)
    generated: list[int] = field(default_factory=list)
    counts: Counter[int] = field(default_factory=Counter)

    @property
    def num_left(self) -> int:
        return len(self.job.ids) - self.num_fed


@dataclass(frozen=True)
class _Chunk:
    """What is fed of a prompt in one step."""

    sequence: _Sequence
    size: int

    @property
    def part(self) -> tuple[int, Sequence[int], Want]:
        """As `Runtime.feed_each` takes it."""
        one = self.sequence
        ids = one.job.ids[one.num_fed : one.num_fed + self.size]
        if one.job.prompt_logprobs is not None:
            return one.slot, ids, "all"
        return one.slot, ids, "last" if self.size == one.num_left else "none"


class Engine:
    """Jobs come by `add`, go on by `step`, end by themselves or by `cancel`; one thread calls all of it.

    A step feeds at most `prefill_tokens` tokens of prompts, oldest first, and gives every sequence that was fed before
    one token: a long prompt delays the others by that many tokens a step and no more. Jobs that find no free slot wait.
    """

    def __init__(self, runtime: Runtime, tokenizer: Tokenizer, *, prefill_tokens: int) -> None:
        self._runtime, self._tokenizer, self._prefill_tokens = runtime, tokenizer, prefill_tokens
        self._waiting: deque[_Sequence] = deque()
        self._feeding: list[_Sequence] = []
        self._running: list[_Sequence] = []
        self._free = list(reversed(range(runtime.max_sequences)))
        self.tokens_generated = 0
        self.tokens_fed = 0
        """Of prompts."""
        self.last_progress_monotonic = time.monotonic()
        """When a step last computed something; `time.monotonic`'s clock."""

    @property
    def running(self) -> int:
        """Jobs that have a slot."""
        return len(self._feeding) + len(self._running)

    @property
    def waiting(self) -> int:
        """Jobs that have none yet."""
        return len(self._waiting)

    @property
    def has_room(self) -> bool:
        """Would a job that is added now be fed by the next step, or wait only for older prompts?"""
        return len(self._free) > len(self._waiting)

    @property
    def is_idle(self) -> bool:
        return not self.running and not self._waiting

    def add(self, key: str, job: Job) -> None:
        """Take a job; `key` is told in its pieces, and no other job that is under way has it.

        Raises RequestRefused where the model cannot do what the job asks for.
        """
        assert all(key != one.key for one in self._all()), f"a job with the key {key} is under way"
        self._check(job)
        seed = secrets.randbits(64) if job.choosing.seed is None else job.choosing.seed
        self._waiting.append(_Sequence(key, job, Detokeniser(self._tokenizer), StopTexts(job.stops), seed))

    def cancel(self, key: str) -> Piece | None:
        """End a job now and free its slot: its last piece, with the text that was held back. None: no such job."""
        sequence = next((one for one in self._all() if one.key == key), None)
        if sequence is None:
            return None
        self._end(sequence)
        rest = sequence.stops.push(sequence.detokeniser.flush()) + sequence.stops.flush()
        return Piece(key, rest, (), finish_reason="cancelled")

    def step(self) -> list[Piece | Failed]:
        """What is new: one piece, or the failure, of each job that went on. Nothing where the engine is idle."""
        before = self.tokens_fed + self.tokens_generated
        stepped = list(self._running)
        found = self._feed()
        if stepped:
            found += self._step(stepped)
        if self.tokens_fed + self.tokens_generated > before:
            self.last_progress_monotonic = time.monotonic()
        return found

    def _feed(self) -> list[Piece | Failed]:
        while self._waiting and self._free:
            sequence = self._waiting.popleft()
            sequence.slot = self._free.pop()
            self._feeding.append(sequence)
        room, scored_room = self._prefill_tokens, SCORED_TOKENS
        chunks: list[_Chunk] = []
        for sequence in self._feeding:
            scored = sequence.job.prompt_logprobs is not None
            size = min(sequence.num_left, room, scored_room if scored else room)
            if size:
                chunks.append(_Chunk(sequence, size))
                room -= size
                scored_room -= size if scored else 0
        return self._feed_chunks(chunks) if chunks else []

    def _feed_chunks(self, chunks: list[_Chunk]) -> list[Piece | Failed]:
        try:
            logits = self._runtime.feed_each([chunk.part for chunk in chunks])
        except Exception as error:
            if len(chunks) > 1:  # whose fault it is shows when each is fed alone
                return [piece for one in chunks for piece in self._feed_chunks([one])]
            self._end(chunks[0].sequence)
            return [Failed(chunks[0].sequence.key, error)]
        found: list[Piece | Failed] = []
        for chunk, rows in zip(chunks, logits, strict=True):
            found += self._guarded(chunk.sequence, partial(self._fed, chunk, rows))
        return found

    def _fed(self, chunk: _Chunk, logits: Logits) -> Piece | None:
        """The piece of the first token, where the prompt is whole."""
        sequence, start = chunk.sequence, chunk.sequence.num_fed
        sequence.num_fed += chunk.size
        self.tokens_fed += chunk.size
        num_top = sequence.job.prompt_logprobs
        if num_top is not None:
            self._score(sequence, logits, start, num_top)
        if sequence.num_left:
            return None
        self._feeding.remove(sequence)
        self._running.append(sequence)
        return self._take(sequence, logits[-1], None if num_top is None else tuple(sequence.prompt_logprobs))

    def _score(self, sequence: _Sequence, logits: Logits, start: int, num_top: int) -> None:
        """Add log-probabilities of the tokens that follow the chunk's: row i tells of the token at `start` + i + 1."""
        following = sequence.job.ids[start + 1 : start + 1 + len(logits)]
        for row, token in zip(logits, following, strict=False):  # the prompt's last token has none
            sequence.prompt_logprobs.append(logprob(row, token, num_top))

    def _step(self, sequences: list[_Sequence]) -> list[Piece | Failed]:
        slots = [one.slot for one in sequences]
        ids = [one.generated[-1] for one in sequences]
        try:
            logits = self._runtime.step(slots, ids)
        except Exception as error:
            if len(sequences) > 1:  # whose fault it is shows when each is stepped alone
                return [piece for one in sequences for piece in self._step([one])]
            self._end(sequences[0])
            return [Failed(sequences[0].key, error)]
        found: list[Piece | Failed] = []
        for sequence, row in zip(sequences, logits, strict=True):
            found += self._guarded(sequence, partial(self._take, sequence, row, None))
        return found

    def _guarded(self, sequence: _Sequence, work: Callable[[], Piece | None]) -> list[Piece | Failed]:
        """The piece that `work` gives, if any; where it raises, the job ends alone."""
        try:
            piece = work()
        except Exception as error:
            self._end(sequence)
            return [Failed(sequence.key, error)]
        return [] if piece is None else [piece]

    def _take(self, sequence: _Sequence, row: Row, prompt_logprobs: tuple[TokenLogprob, ...] | None) -> Piece:
        """Choose the next token by its logits, and see whether the job ends with it."""
        job, position = sequence.job, len(sequence.generated)
        token = choose(row, job.choosing, sequence.seed, position, sequence.counts)
        logprobs = () if job.logprobs is None else (logprob(row, token, job.logprobs),)
        sequence.generated.append(token)
        sequence.counts[token] += 1
        self.tokens_generated += 1
        reason: FinishReason | None = None
        text = ""
        if token in job.stop_ids:
            reason = "stop"
        else:
            text = sequence.stops.push(sequence.detokeniser.push(token))
            if sequence.stops.found:
                reason = "stop"
            elif len(sequence.generated) == job.max_tokens:
                reason = "length"
        if reason is not None:
            text += sequence.stops.push(sequence.detokeniser.flush()) + sequence.stops.flush()
            self._end(sequence)
        return Piece(sequence.key, text, (token,), logprobs, prompt_logprobs, reason)

    def _end(self, sequence: _Sequence) -> None:
        """Forget a job and free its slot."""
        if sequence in self._waiting:
            self._waiting.remove(sequence)
            return
        (self._feeding if sequence in self._feeding else self._running).remove(sequence)
        self._runtime.drop(sequence.slot)
        self._free.append(sequence.slot)

    def _all(self) -> list[_Sequence]:
        return [*self._running, *self._feeding, *self._waiting]

    def _check(self, job: Job) -> None:
        """Raises RequestRefused."""
        room, vocabulary = self._runtime.context_tokens, self._runtime.vocab_size
        if not job.ids:
            raise RequestRefused("the prompt has no token; give at least one", 400, "empty_prompt")
        if len(job.ids) + job.max_tokens > room:
            left = room - len(job.ids)
            remedy = f"lower max_tokens to {left}" if left > 0 else f"shorten it to {room - 1} at most"
            raise RequestRefused(
                f"the prompt has {len(job.ids)} tokens, with max_tokens={job.max_tokens} that is more than the "
                f"context's {room}: {remedy}",
                400,
                "context_length_exceeded",
            )
        if wrong := [token for token in (*job.ids, *job.choosing.logit_bias) if not 0 <= token < vocabulary]:
            raise RequestRefused(
                f"there is no token {wrong[0]}: ids go from 0 to {vocabulary - 1}", 400, "unknown_token"
            )
        if "" in job.stops:
            raise RequestRefused("an empty stop text would end every answer at once; leave it out", 400, "empty_stop")
