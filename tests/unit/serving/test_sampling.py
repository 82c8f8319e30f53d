"""The choice of tokens against transformers' own processors, and log-probabilities against torch's."""

from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from llmtrain.errors import EngineFailed
from llmtrain.serving.jobs import Choosing
from llmtrain.serving.sampling import choose, largest, logprob

LARGE = 151_936
DRAWS = 5_000


def row(size: int, seed: int = 0, spread: float = 3.0) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal(size) * spread).astype(np.float32)


def drawn(logits: np.ndarray, choosing: Choosing, number: int = DRAWS) -> np.ndarray:
    """How often each token comes."""
    counts = np.zeros(len(logits))
    for position in range(number):
        counts[choose(logits, choosing, 0, position, {})] += 1
    return counts


def expected(logits: np.ndarray, choosing: Choosing) -> np.ndarray:
    """The probabilities that transformers draws from."""
    scores = torch.from_numpy(logits)[None]
    for processor in (
        TemperatureLogitsWarper(choosing.temperature),
        *([TopKLogitsWarper(choosing.top_k)] if choosing.top_k else []),
        *([TopPLogitsWarper(choosing.top_p)] if choosing.top_p < 1 else []),
    ):
        scores = processor(None, scores)
    return scores[0].double().softmax(-1).numpy()


@pytest.mark.parametrize(
    "choosing",
    [
        Choosing(),
        Choosing(temperature=0.3),
        Choosing(temperature=1.7, top_k=5),
        Choosing(top_p=0.7),
        Choosing(temperature=1.5, top_k=20, top_p=0.9),
        Choosing(top_p=1e-6),
        Choosing(top_k=1),
    ],
)
def test_tokens_are_drawn_as_transformers_draws_them(choosing: Choosing):
    logits = row(40, spread=1.5)
    probabilities, counts = expected(logits, choosing), drawn(logits, choosing)
    assert not counts[probabilities == 0].any()
    assert counts[probabilities > 3e-3].all(), "all of those that transformers leaves come"
    deviations = np.sqrt(DRAWS * probabilities * (1 - probabilities))
    assert (np.abs(counts - DRAWS * probabilities) <= 4.5 * deviations + 1e-6).all()


@pytest.mark.parametrize("top_p", [0.1, 0.5, 0.9, 0.99, 0.9999])
@pytest.mark.parametrize("spread", [0.5, 3.0, 10.0])
def test_a_nucleus_of_many_tokens_is_the_fewest_that_reach_the_mass(top_p: float, spread: float):
    logits = row(5_000, spread=spread)
    probabilities = np.sort(torch.from_numpy(logits).double().softmax(-1).numpy())[::-1]
    size = int(np.searchsorted(probabilities.cumsum(), top_p)) + 1
    inside = set(np.argsort(-logits)[:size].tolist())
    counts = drawn(logits, Choosing(top_p=top_p), 150)
    assert set(np.flatnonzero(counts).tolist()) <= inside
    assert counts.sum() == 150


def test_what_equals_the_kth_is_left_in_as_in_transformers():
    logits = np.array([1, 3, 2, 2, 0], np.float32)
    counts = drawn(logits, Choosing(top_k=2), 400)
    assert np.flatnonzero(counts).tolist() == [1, 2, 3]


@pytest.mark.parametrize("temperature", [0.0, 1e-6])
def test_greedy_is_the_lowest_id_of_the_likeliest(temperature: float):
    logits = row(1_000)
    logits[[700, 300, 800]] = 50
    assert choose(logits, Choosing(temperature=temperature, top_k=5, top_p=0.1), 0, 0, {}) == 300


def test_penalties_are_openais_formula_over_generated_tokens():
    logits = np.array([5, 4.5, 4, 0], np.float32)
    greedy = {"temperature": 0.0}
    assert choose(logits, Choosing(**greedy, frequency_penalty=0.3), 0, 0, {0: 1}) == 0  # 4.7 against 4.5
    assert choose(logits, Choosing(**greedy, frequency_penalty=0.3), 0, 0, {0: 2}) == 1  # 4.4
    assert choose(logits, Choosing(**greedy, presence_penalty=0.6), 0, 0, {0: 9}) == 1  # 4.4, however often
    both = Choosing(**greedy, presence_penalty=0.6, frequency_penalty=0.3)
    assert choose(logits, both, 0, 0, {0: 1, 1: 1}) == 0  # 4.1, 3.6, 4.0
    assert choose(logits, both, 0, 0, {0: 2, 1: 1}) == 2  # 3.8, 3.6, 4.0
    assert choose(logits, Choosing(**greedy, presence_penalty=-2.0), 0, 0, {2: 1}) == 2
    assert logits.tolist() == [5, 4.5, 4, 0], "the logits are not written to"


def test_a_bias_is_added_before_anything_is_cut():
    logits = np.array([5, 4, 0], np.float32)
    assert choose(logits, Choosing(temperature=0.0, logit_bias={2: 5.5}), 0, 0, {}) == 2
    counts = drawn(logits, Choosing(top_k=1, logit_bias={0: -100.0}), 50)
    assert counts.tolist() == [0, 50, 0]


@pytest.mark.parametrize("seed", [0, -1, 2**63, 2**64 - 1])
def test_draws_depend_on_seed_and_position_alone(seed: int):
    logits, choosing = row(1_000, spread=0.5), Choosing(seed=seed)
    tokens = [choose(logits, choosing, seed, position, {}) for position in range(50)]
    assert tokens == [choose(logits, choosing, seed, position, {}) for position in range(50)]
    others = [choose(logits, choosing, seed + 1, position, {}) for position in range(50)]
    assert len(set(tokens)) > 40
    assert Counter(a == b for a, b in zip(tokens, others, strict=True))[True] < 5


@pytest.mark.parametrize("wrong", [np.nan, np.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_finite_are_an_error(wrong: float, temperature: float):
    logits = row(100)
    logits[17] = wrong
    with pytest.raises(EngineFailed, match="not finite"):
        choose(logits, Choosing(temperature=temperature), 0, 0, {})
    with pytest.raises(EngineFailed, match="not finite"):
        logprob(logits, 3, 0)


def test_tokens_ruled_out_by_minus_infinity_never_come():
    logits = np.full(50, -np.inf, np.float32)
    logits[[4, 9]] = 1
    assert np.flatnonzero(drawn(logits, Choosing(), 100)).tolist() == [4, 9]
    assert logprob(logits, 4, 0).logprob == pytest.approx(np.log(0.5))


@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_logprobs_ranks_and_likeliest_are_torchs(offset: float):
    logits = row(LARGE) + np.float32(offset)
    exact = torch.from_numpy(logits).double().log_softmax(-1)
    order = exact.argsort(descending=True, stable=True).tolist()
    for rank in (0, 1, 30, 5_000, LARGE - 1):
        found = logprob(logits, order[rank], 20)
        assert found.id == order[rank]
        assert found.logprob == pytest.approx(exact[order[rank]].item(), abs=1e-6)
        assert found.rank == rank + 1 - sum(logits[order[rank]] == logits[order[place]] for place in range(rank))
        assert [token for token, _ in found.top] == order[:20]
        assert [value for _, value in found.top] == pytest.approx(exact[order[:20]].tolist(), abs=1e-6)


@given(st.lists(st.integers(-5, 5), min_size=1, max_size=700), st.integers(0, 720))
def test_the_largest_come_in_order_and_equals_by_their_place(values: list[int], number: int):
    found = largest(np.array(values, np.float32), number).tolist()
    assert found == sorted(range(len(values)), key=lambda place: (-values[place], place))[:number]
