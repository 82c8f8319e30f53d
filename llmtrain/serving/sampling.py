"""From logits to the next token, and to log-probabilities. numpy only; a row of logits at a time."""

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from llmtrain.errors import EngineFailed
from llmtrain.serving.jobs import Choosing, TokenLogprob

Row = NDArray[np.float32]
"""Logits [vocab_size]."""
GREEDY_BELOW = 1e-5
"""Temperatures below it take the likeliest: logits divided by them would overflow."""
STRIPS = 64
"""How many values of a row are compared first when its largest are looked for."""
BLOCK = 512
"""Weights that are summed before a token is drawn among them."""
FEW = 64
"""How many of the heaviest are tried for a nucleus first."""
NOT_FINITE = "the model gives logits that are not finite: its weights are damaged, or it diverged"


def choose(logits: Row, choosing: Choosing, seed: int, position: int, counts: Mapping[int, int]) -> int:
    """The next token: the likeliest, the lowest of equals, or one drawn by `seed` and `position` alone.

    `counts`: how often each token was generated so far. In this order: penalties (OpenAI's formula), bias, temperature,
    `top_k` (and what equals the k-th), then `top_p` of what is left: the fewest of the likeliest whose mass reaches it.
    Raises EngineFailed where the logits are not finite.
    """
    logits = _adjusted(logits, choosing, counts)
    likeliest = int(logits.argmax())  # of a NaN, if there is one
    best = logits[likeliest]
    if not np.isfinite(best):
        raise EngineFailed(NOT_FINITE)
    if choosing.temperature < GREEDY_BELOW:
        return likeliest
    candidates, scores = _candidates(logits, choosing.top_k)
    weights = np.exp((scores - best) / np.float32(choosing.temperature))
    if choosing.top_p < 1:
        candidates, weights = _nucleus(candidates, weights, choosing.top_p)
    place = _drawn(weights, _uniform(seed, position))
    return place if candidates is None else int(candidates[place])


def logprob(logits: Row, token: int, num_top: int) -> TokenLogprob:
    """Of `token`, with its rank and the `num_top` likeliest; of equals the lowest id comes first.

    Raises EngineFailed where the logits are not finite.
    """
    value, best = logits[token], logits.max()
    if not np.isfinite(best):
        raise EngineFailed(NOT_FINITE)
    normaliser = np.float64(best) + np.log(np.exp(logits - best).sum(dtype=np.float64))
    top = tuple((int(one), float(logits[one] - normaliser)) for one in largest(logits, num_top))
    return TokenLogprob(token, float(value - normaliser), int(np.count_nonzero(logits > value)) + 1, top)


def largest(values: Row, number: int) -> NDArray[np.int64]:
    """The indices of the `number` largest values, largest first, of equals the lowest index first.

    The largest values of strips bound the `number`-th from below, so that few are left to sort.
    """
    number = min(number, len(values))
    if number == 0:
        return np.empty(0, np.int64)
    if number == 1:
        return np.array([values.argmax()])
    strips = values[: len(values) - len(values) % STRIPS].reshape(STRIPS, -1).max(axis=0)
    found = np.flatnonzero(values >= _nth_largest(strips, number)) if len(strips) > number else np.arange(len(values))
    order = np.argsort(-values[found], kind="stable")
    return found[order[:number]]


def _adjusted(logits: Row, choosing: Choosing, counts: Mapping[int, int]) -> Row:
    """`logits`, or a copy under penalties and bias."""
    penalised = bool(counts) and (choosing.presence_penalty or choosing.frequency_penalty)
    if not penalised and not choosing.logit_bias:
        return logits
    logits = logits.copy()
    if penalised:
        ids = np.fromiter(counts.keys(), np.int64, len(counts))
        times = np.fromiter(counts.values(), np.float32, len(counts))
        logits[ids] -= choosing.presence_penalty + choosing.frequency_penalty * times
    for token, bias in choosing.logit_bias.items():
        logits[token] += bias
    return logits


def _candidates(logits: Row, top_k: int) -> tuple[NDArray[np.int64] | None, Row]:
    """Ids (None: all, in order) and logits of those that `top_k` leaves, by id."""
    if not 0 < top_k < len(logits):
        return None, logits
    kth = logits[largest(logits, top_k)[-1]]
    ids = np.flatnonzero(logits >= kth)
    return ids, logits[ids]


def _nucleus(ids: NDArray[np.int64] | None, weights: Row, top_p: float) -> tuple[NDArray[np.int64], Row]:
    """The fewest of the heaviest whose sum reaches `top_p` of the whole, at least one; of equals the first."""
    needed = top_p * weights.sum(dtype=np.float64)
    kept = largest(weights, FEW)
    mass = np.cumsum(weights[kept], dtype=np.float64)
    if mass[-1] >= needed:
        kept = kept[: int(np.searchsorted(mass, needed)) + 1]
    elif len(kept) < len(weights):
        heaviest = np.sort(weights)[::-1]
        size = int(np.searchsorted(np.cumsum(heaviest, dtype=np.float64), needed)) + 1
        lightest = heaviest[min(size, len(weights)) - 1]
        heavier = np.flatnonzero(weights > lightest)
        kept = np.concatenate([heavier, np.flatnonzero(weights == lightest)[: size - len(heavier)]])
    return (kept if ids is None else ids[kept]), weights[kept]


def _drawn(weights: Row, uniform: float) -> int:
    """A place drawn in proportion to `weights`, by a number in [0, 1); never one of weight 0.

    The block is looked for first, then the place in it: sums along a whole row take longer than all else.
    """
    sums = np.cumsum(np.add.reduceat(weights, np.arange(0, len(weights), BLOCK)), dtype=np.float64)
    target = uniform * sums[-1]
    block = _first_above(sums, target)
    inside = np.cumsum(weights[block * BLOCK : (block + 1) * BLOCK], dtype=np.float64)
    return block * BLOCK + _first_above(inside, target - (sums[block - 1] if block else 0.0))


def _first_above(sums: NDArray[np.float64], target: float) -> int:
    """Where sums along a row first exceed `target`; of one that is too large by rounding, the last that has weight."""
    return int(np.searchsorted(sums, min(target, np.nextafter(sums[-1], 0.0)), side="right"))


def _nth_largest(values: Row, number: int) -> np.float32:
    return np.float32(np.partition(values, len(values) - number)[len(values) - number])


def _uniform(seed: int, position: int) -> float:
    """In [0, 1), of `seed` and `position` alone."""
    key = np.array([seed % 2**64, position], np.uint64)
    return float(np.random.Generator(np.random.Philox(key=key)).random())
