"""What is asked of the engine, sequence by sequence, and what it gives back, piece by piece."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

FinishReason = Literal["stop", "length", "cancelled"]


@dataclass(frozen=True)
class Choosing:
    """How the next token is drawn from the logits."""

    temperature: float = 1.0
    """0: the likeliest."""
    top_p: float = 1.0
    top_k: int = 0
    """0: all."""
    seed: int | None = None
    """Draws depend on nothing but it, the logits and the position; None: another one each time."""
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Job:
    """One sequence to continue."""

    ids: tuple[int, ...]
    """The prompt, one token at least."""
    max_tokens: int
    """Most tokens to generate, at least 1; prompt and answer fit the context together."""
    choosing: Choosing = Choosing()
    stops: tuple[str, ...] = ()
    """Texts that end the answer and are not part of it."""
    stop_ids: frozenset[int] = frozenset()
    """Tokens that end the answer; their text is not part of it."""
    logprobs: int | None = None
    """Give the generated tokens' log-probabilities, and those of so many likeliest."""
    prompt_logprobs: int | None = None
    """The same of the prompt's tokens."""


@dataclass(frozen=True)
class TokenLogprob:
    """Natural logarithms, of the model's own distribution: before temperature, penalties and cuts."""

    id: int
    logprob: float
    rank: int
    """1: the likeliest."""
    top: tuple[tuple[int, float], ...] = ()
    """The likeliest tokens with their log-probabilities, best first."""


@dataclass(frozen=True)
class Piece:
    """What is new of one job."""

    key: str
    text: str
    """What can be shown: incomplete characters, and what may become a stop text, are held back."""
    token_ids: tuple[int, ...]
    """Tokens generated since the last piece, those whose text is held back included."""
    logprobs: tuple[TokenLogprob, ...] = ()
    """One for each of `token_ids`, where they were asked for."""
    prompt_logprobs: tuple[TokenLogprob, ...] | None = None
    """For each token of the prompt but the first; with the first piece, where they were asked for."""
    finish_reason: FinishReason | None = None
    """Set in a job's last piece."""


@dataclass(frozen=True)
class Failed:
    """A job's end that is no answer; the others go on."""

    key: str
    error: Exception
