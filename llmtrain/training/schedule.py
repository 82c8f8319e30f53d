"""When things happen and how fast it learns, counted in tokens."""

import math


def learning_rate(tokens: int, *, peak: float, warmup_tokens: int, total_tokens: int, min_share: float) -> float:
    """Linear rise to `peak` over `warmup_tokens`, then half a cosine down to `min_share * peak` at `total_tokens`.

    `tokens` counts those trained on when the step is over, so that the first step does not stand still.
    """
    if tokens < warmup_tokens:
        return peak * tokens / warmup_tokens
    done = min((tokens - warmup_tokens) / max(total_tokens - warmup_tokens, 1), 1.0)
    return peak * (min_share + (1 - min_share) * 0.5 * (1 + math.cos(math.pi * done)))


def due(before: int, after: int, every: int) -> bool:
    """Does the step from `before` to `after` tokens reach or cross a multiple of `every`?"""
    return after // every > before // every
