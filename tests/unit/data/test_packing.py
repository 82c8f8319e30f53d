import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmtrain.data.packing import best_fit, pieces

LENGTHS = st.lists(st.integers(1, 64), max_size=200)


def test_rows_found_by_hand() -> None:
    # 7 opens a row with room 3; 6 one with room 4; 4 fits that best; 3 the first; 2 and 2 open a third
    assert best_fit([2, 6, 3, 4, 7, 2], 10) == [[4, 2], [1, 3], [0, 5]]
    assert best_fit([3, 5, 4, 4], 8) == [[1, 0], [2, 3]]  # the 3 goes where the least room is left: exactly 3
    assert best_fit([], 8) == []


@given(LENGTHS, st.integers(64, 100))
def test_each_sequence_is_in_one_row_and_no_row_overflows(lengths: list[int], capacity: int) -> None:
    rows = best_fit(lengths, capacity)
    assert sorted(index for row in rows for index in row) == list(range(len(lengths)))
    filled = [sum(lengths[index] for index in row) for row in rows]
    assert all(0 < tokens <= capacity for tokens in filled)
    assert len(rows) <= max(1, 2 * sum(lengths) / capacity) or not rows  # no two rows would fit one
    assert best_fit(np.array(lengths, dtype=np.int32), capacity) == rows


@settings(deadline=None, max_examples=40)
@given(st.lists(st.integers(1, 64), min_size=1, max_size=200))
def test_as_few_rows_as_trl_makes(lengths: list[int]) -> None:
    import pyarrow as pa
    from trl.data_utils import _pack_bfd

    table = pa.table({"input_ids": [[0] * length for length in lengths]})
    assert len(best_fit(lengths, 64)) == len(_pack_bfd(table, 64))


def test_rows_of_a_thousand_random_lengths_are_those_of_trl() -> None:
    from datasets import Dataset
    from trl import pack_dataset

    lengths = np.random.default_rng(0).integers(1, 513, 1000)
    packed = pack_dataset(Dataset.from_dict({"input_ids": [[0] * n for n in lengths]}), 512, "bfd")
    rows = best_fit(lengths, 512)
    assert sorted(sorted(lengths[row].tolist()) for row in rows) == sorted(sorted(row) for row in packed["seq_lengths"])
    assert len(rows) == 539  # 517 would be full


@pytest.mark.parametrize("lengths", [[0, 3], [3, 9]])
def test_a_length_that_no_row_holds_is_refused(lengths: list[int]) -> None:
    with pytest.raises(ValueError, match="do not all fit rows of 1 to 8"):
        best_fit(lengths, 8)


def test_pieces_found_by_hand() -> None:
    offsets = np.array([0, 3, 3, 11, 15])  # documents of 3, 0, 8 and 4 tokens
    assert pieces(offsets, 4).tolist() == [[0, 3], [3, 7], [7, 11], [11, 15]]
    assert pieces(offsets, 3).tolist() == [[0, 3], [3, 6], [6, 9], [9, 11], [11, 14], [14, 15]]
    assert pieces(np.array([0]), 4).tolist() == []


@given(st.lists(st.integers(0, 300)), st.integers(1, 64))
def test_pieces_cover_each_token_once_and_never_cross_a_document(lengths: list[int], capacity: int) -> None:
    offsets = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
    found = pieces(offsets, capacity)
    assert [token for start, stop in found for token in range(start, stop)] == list(range(offsets[-1]))
    document = np.repeat(np.arange(len(lengths)), lengths)
    assert all(document[start] == document[stop - 1] and stop - start <= capacity for start, stop in found)
    assert len(found) == sum(-(-length // capacity) for length in lengths)
