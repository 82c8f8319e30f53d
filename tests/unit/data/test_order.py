import time
from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st

from llmtrain.data.order import shuffled


@settings(max_examples=40, deadline=None)
@given(num_items=st.integers(1, 700), seed=st.integers(0, 2**40), epoch=st.integers(0, 10**9))
def test_each_epoch_shows_every_item_once(num_items: int, seed: int, epoch: int) -> None:
    start = epoch * num_items
    assert sorted(shuffled(start + i, num_items, seed) for i in range(num_items)) == list(range(num_items))


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    def order(epoch: int, seed: int) -> list[int]:
        return [shuffled(epoch * 100 + i, 100, seed) for i in range(100)]

    assert order(0, seed=0) == order(0, seed=0)
    assert len({tuple(order(epoch, seed)) for epoch in range(3) for seed in range(3)}) == 9
    assert list(range(100)) != order(0, seed=0)


def test_the_first_item_of_an_epoch_is_uniform() -> None:
    counts = Counter(shuffled(epoch * 10, 10, seed=7) for epoch in range(5000))
    chi_square = sum((counts[item] - 500) ** 2 / 500 for item in range(10))
    assert chi_square < 27.88  # the 99.9 % quantile at 9 degrees of freedom


def test_all_orders_of_three_items_are_equally_likely() -> None:
    counts = Counter(tuple(shuffled(epoch * 3 + i, 3, seed=1) for i in range(3)) for epoch in range(1500))
    assert len(counts) == 6
    assert sum((count - 250) ** 2 / 250 for count in counts.values()) < 20.52  # 99.9 % at 5 degrees of freedom


def test_a_position_a_trillion_ahead_is_instant() -> None:
    start = time.perf_counter()
    assert 0 <= shuffled(10**12, 3_000_000_000, seed=0) < 3_000_000_000
    assert time.perf_counter() - start < 0.1
