"""The rectangle of keys and values: whatever is fed, stepped and dropped, each sequence finds its own."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmtrain.serving.slots import FEWEST_TOKENS, Slots

SEQUENCES, CONTEXT = 5, 150


def empty(sequences: int = SEQUENCES, context: int = CONTEXT) -> Slots:
    return Slots(
        lambda rows, capacity: np.zeros((rows, 1, capacity, 1)), 2, max_sequences=sequences, context_tokens=context
    )


def feed(slots: Slots, slot: int, values: list[float]) -> None:
    row = slots.row(slot, len(values))
    start = int(slots.lengths[row])
    for sign, array in zip((1, -1), slots.arrays, strict=True):
        array[row, 0, start : start + len(values), 0] = sign * np.array(values)
    slots.lengths[row] += len(values)


def step(slots: Slots, values: dict[int, float]) -> None:
    rows = slots.front(list(values))
    assert sorted(rows) == list(range(len(values))), "those that are stepped stand in the first rows"
    for sign, array in zip((1, -1), slots.arrays, strict=True):
        array[rows, 0, slots.lengths[rows], 0] = sign * np.array(list(values.values()))
    slots.lengths[rows] += 1


def found(slots: Slots, slot: int) -> list[float]:
    row = slots.row(slot, 0)
    keys, values = (array[row, 0, :, 0] for array in slots.arrays)
    assert np.array_equal(keys, -values)
    assert not keys[slots.lengths[row] :].any(), "all that is not the sequence's is 0"
    return keys[: slots.lengths[row]].tolist()


MOVES = st.lists(
    st.one_of(
        st.tuples(st.just("feed"), st.integers(0, SEQUENCES - 1), st.integers(1, 70)),
        st.tuples(st.just("step"), st.permutations(range(SEQUENCES)), st.integers(1, SEQUENCES)),
        st.tuples(st.just("drop"), st.integers(0, SEQUENCES - 1), st.just(0)),
    ),
    max_size=30,
)


@given(MOVES)
def test_each_sequence_finds_what_it_was_given(moves):
    slots, expected, clock = empty(), dict[int, list[float]](), 0.0
    for verb, where, number in moves:
        match verb:
            case "feed" if len(expected.get(where, [])) + number <= CONTEXT:
                values = [clock := clock + 1 for _ in range(number)]
                feed(slots, where, values)
                expected[where] = expected.get(where, []) + values
            case "step":
                values = {
                    slot: (clock := clock + 1) for slot in where[:number] if len(expected.get(slot, [])) < CONTEXT
                }
                if values:
                    step(slots, values)
                for slot, value in values.items():
                    expected[slot] = [*expected.get(slot, []), value]
            case "drop":
                slots.drop(where)
                expected.pop(where, None)
        for slot, values in expected.items():
            assert found(slots, slot) == values


def test_a_step_of_the_same_sequences_moves_nothing(monkeypatch: pytest.MonkeyPatch):
    slots = empty()
    for slot in (3, 1, 4):
        feed(slots, slot, [1.0])
    slots.drop(3)
    step(slots, {4: 2.0, 1: 2.0})  # of rows 1 and 2, one goes to the empty row 0
    generation = slots.generation
    monkeypatch.setattr(slots, "_exchange", lambda *rows: pytest.fail(f"moved {rows}"))
    for _ in range(20):
        step(slots, {4: 2.0, 1: 2.0})
    assert slots.generation == generation


def test_memory_follows_the_sequences_and_comes_back():
    slots = empty(sequences=16, context=100_000)
    feed(slots, 0, [1.0])
    assert slots.arrays[0].shape == (1, 1, FEWEST_TOKENS, 1)
    feed(slots, 0, [1.0] * 64)
    feed(slots, 1, [1.0])
    feed(slots, 2, [1.0])
    assert slots.arrays[0].shape == (4, 1, 128, 1)
    for slot in range(3):
        slots.drop(slot)
    assert slots.arrays == []


def test_what_has_no_room_is_refused_and_changes_nothing():
    slots = empty()
    feed(slots, 0, [1.0] * CONTEXT)
    feed(slots, 1, [2.0])
    with pytest.raises(ValueError, match="151 tokens in a sequence, of which the context has 150"):
        slots.row(0, 1)
    with pytest.raises(ValueError, match="151 tokens"):
        slots.front([1, 0])
    with pytest.raises(ValueError, match="slot 5 is none of 0 to 4"):
        slots.row(5, 1)
    with pytest.raises(ValueError, match="not several"):
        slots.front([1, 1])
    assert (found(slots, 0), found(slots, 1)) == ([1.0] * CONTEXT, [2.0])
