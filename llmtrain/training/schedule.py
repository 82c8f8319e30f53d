"""When things happen and how fast it learns, counted in tokens."""

import math
from typing import Literal

Schedule = Literal["cosine", "wsd", "constant"]


def learning_rate(
    tokens: int,
    *,
    peak: float,
    warmup_tokens: int,
    total_tokens: int,
    min_share: float,
    schedule: Schedule,
    decay_share: float,
) -> float:
    """Linear rise to `peak` over `warmup_tokens`, then by `schedule` to the end at `total_tokens`.

    `cosine`: half a cosine down to `min_share * peak` (arXiv 1608.03983, equation 5). `wsd`: at `peak` until the last
    `decay_share` of `total_tokens`, over which it falls linearly to `min_share * peak` (arXiv 2404.06395, section 4;
    linear: arXiv 2405.18392), never before the rise is over. `constant`: at `peak`.

    `tokens` counts those trained on when the step is over, so that the first step does not stand still.
    """
    if tokens < warmup_tokens:
        return peak * tokens / warmup_tokens
    match schedule:
        case "cosine":
            left = 0.5 * (1 + math.cos(math.pi * _share(tokens, warmup_tokens, total_tokens)))
        case "wsd":
            left = 1 - _share(tokens, max(warmup_tokens, round(total_tokens * (1 - decay_share))), total_tokens)
        case "constant":
            left = 1.0
    return peak * (min_share + (1 - min_share) * left)


def due(before: int, after: int, every: int) -> bool:
    """Does the step from `before` to `after` tokens reach or cross a multiple of `every`?"""
    return after // every > before // every


def _share(tokens: int, start: int, stop: int) -> float:
    """How much of the way from `start` to `stop` is done, 0 to 1."""
    return min(max(tokens - start, 0) / max(stop - start, 1), 1.0)
