import pickle
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmtrain.data.text import ShardWriter, TokenShards, smallest_dtype

DOCUMENTS = [[5, 6, 7], [8], [9, 10, 11, 12, 13, 14, 15], [16, 17]]  # 13 tokens: 5 to 17


@pytest.fixture
def shards(tmp_path: Path) -> TokenShards:
    return write(tmp_path, shard_tokens=4)


def write(directory: Path, shard_tokens: int) -> TokenShards:
    writer = ShardWriter(directory, "train", np.dtype("<u2"), shard_tokens)
    for document in DOCUMENTS:
        writer.append(document, num_bytes=10)
    counts = writer.close()
    assert (counts.num_documents, counts.num_tokens, counts.num_bytes) == (4, 13, 40)
    return TokenShards(directory, "train")


def test_shards_hold_at_most_their_tokens_little_endian(shards: TokenShards, tmp_path: Path) -> None:
    sizes = {path.name: path.stat().st_size for path in tmp_path.glob("*.uint16")}
    assert sizes == {f"train-0000{n}.uint16": 2 * tokens for n, tokens in enumerate([4, 4, 4, 1])}
    assert (tmp_path / "train-00000.uint16").read_bytes() == bytes([5, 0, 6, 0, 7, 0, 8, 0])


def test_rows_overlap_by_one_token_and_cross_shards_and_documents(shards: TokenShards) -> None:
    assert shards.num_rows(5) == 2
    assert shards.row(0, 5).tolist() == [5, 6, 7, 8, 9, 10]
    assert shards.row(1, 5).tolist() == [10, 11, 12, 13, 14, 15]
    assert shards.row(0, 5).dtype == np.int64


def test_evaluation_rows_add_the_shorter_last_one(shards: TokenShards) -> None:
    assert [row.tolist() for row in shards.evaluation_rows(5)] == [
        [5, 6, 7, 8, 9, 10],
        [10, 11, 12, 13, 14, 15],
        [15, 16, 17],
    ]


@given(sequence_tokens=st.integers(1, 20), shard_tokens=st.integers(1, 20))
def test_every_token_but_the_first_is_a_target_once(
    sequence_tokens: int, shard_tokens: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    shards = write(tmp_path_factory.mktemp("shards"), shard_tokens)
    targets = [token for row in shards.evaluation_rows(sequence_tokens) for token in row[1:]]
    assert targets == list(range(6, 18))
    whole = [shards.row(index, sequence_tokens) for index in range(shards.num_rows(sequence_tokens))]
    assert all(len(row) == sequence_tokens + 1 for row in whole)
    assert [token for row in whole for token in row[1:]] == targets[: len(whole) * sequence_tokens]
    assert [shards.document(index).tolist() for index in range(shards.num_documents)] == DOCUMENTS


def test_token_counts_count_every_shard(shards: TokenShards) -> None:
    assert shards.token_counts().tolist() == [0] * 5 + [1] * 13
    assert shards.token_counts(20).tolist() == [0] * 5 + [1] * 13 + [0] * 2


def test_a_worker_maps_the_files_itself(shards: TokenShards) -> None:
    pickled = pickle.dumps(shards)
    assert len(pickled) < 500
    assert pickle.loads(pickled).row(1, 5).tolist() == shards.row(1, 5).tolist()  # noqa: S301


def test_ids_up_to_65535_take_two_bytes() -> None:
    assert [smallest_dtype(2**16).itemsize, smallest_dtype(2**16 + 1).itemsize] == [2, 4]
