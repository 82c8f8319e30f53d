"""What a packed row says: each target is predicted from exactly the tokens before it in its own sequence."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import random_tree

from llmtrain.models.attention import dense_mask
from llmtrain.models.packed import Answer, Packed, Tree, document, pack, pair


def lists(packed: Packed) -> dict[str, list]:
    names = ("ids", "positions", "segments", "predictors", "targets", "owners")
    return {name: getattr(packed, name).tolist() for name in names}


def test_two_pairs_in_a_row_as_the_docstring_draws_them():
    first = pair(np.array([10, 11, 12]), np.array([13, 14]), np.array([15, 16, 17]))
    second = pair(np.array([20, 21]), np.array([22]), np.array([23, 24, 25]))
    packed = pack([first, second])
    assert lists(packed) == {
        "ids": [10, 11, 12, 13, 15, 16, 20, 21, 23, 24],
        "positions": [0, 1, 2, 3, 3, 4, 0, 1, 2, 3],
        "segments": [[0, 4, 0, 0], [4, 6, 0, 3], [6, 8, 6, 6], [8, 10, 6, 8]],
        "predictors": [2, 3, 2, 4, 5, 7, 7, 8, 9],
        "targets": [13, 14, 15, 16, 17, 22, 23, 24, 25],
        "owners": [0, 0, 1, 1, 1, 2, 3, 3, 3],
    }
    assert packed.num_owners == 4
    assert [tree.num_tokens for tree in (first, second)] == [6, 4]


def test_the_first_token_of_a_document_is_no_target_and_the_last_is_no_input():
    packed = pack([document(np.array([5, 6, 7])), document(np.array([8, 9]), np.array([True, True]))])
    assert lists(packed) == {
        "ids": [5, 6, 8],
        "positions": [0, 1, 0],
        "segments": [[0, 2, 0, 0], [2, 3, 2, 2]],
        "predictors": [0, 1, 2],
        "targets": [6, 7, 9],
        "owners": [0, 0, 1],
    }


def test_only_the_tokens_that_are_marked_are_targets():
    marked = np.array([True, False, True, True, False])
    packed = pack(
        [document(np.array([1, 2, 3, 4, 5]), marked), Tree(np.array([6]), [Answer(np.array([7]), ~marked[:1])])]
    )
    assert (packed.predictors.tolist(), packed.targets.tolist()) == ([1, 2], [3, 4])
    assert packed.num_owners == 2, "an answer without targets counts all the same"


shapes = st.lists(st.tuples(st.integers(0, 6), st.lists(st.integers(1, 6), min_size=1, max_size=3)), max_size=6)


@given(shapes=shapes, pad_to=st.integers(1, 40), seed=st.integers(0, 2**32 - 1))
@settings(deadline=None, derandomize=True)
def test_what_a_predictor_sees_is_its_sequence_up_to_the_target(shapes, pad_to, seed):
    """Ids, positions, mask, predictors, targets and owners at once, against the sequences written out."""
    random = np.random.default_rng(seed)
    trees = [random_tree(random, prompt, *answers) for prompt, answers in shapes]
    packed, expected = pack(trees, pad_to), []
    for tree in trees:
        for answer in tree.answers:
            sequence, owner = [*tree.prompt, *answer.ids], len(expected)
            places = np.flatnonzero(answer.is_target) + len(tree.prompt)
            expected.append([(owner, sequence[:place], sequence[place]) for place in places if place > 0])
    sees, found = dense_mask(packed), []
    for place, target, owner in zip(packed.predictors, packed.targets, packed.owners, strict=True):
        context = packed.ids[sees[place]]
        assert packed.positions[sees[place]].tolist() == list(range(len(context)))
        found.append((owner.item(), context.tolist(), target.item()))
    assert found == [target for targets in expected for target in targets]
    assert packed.num_owners == len(expected)

    used = sum(tree.num_tokens for tree in trees)
    assert packed.num_tokens == max(used, pad_to)
    assert packed.segments[:, 0].tolist() == [0, *packed.segments[:-1, 1].tolist()], "the segments cover the row"
    assert packed.segments[-1, 1] == packed.num_tokens
    assert not sees[:used, used:].any(), "nobody sees the padding"
    assert sees.diagonal().all(), "no row of the mask is empty: softmax would be NaN"


@pytest.mark.parametrize(("multiple", "tokens"), [(1, 11), (8, 16), (11, 11), (40, 40)])
def test_rows_are_filled_up_to_a_multiple(multiple, tokens):
    trees = [document(np.arange(1, 8)), document(np.arange(1, 7))]  # rows of six and five inputs
    packed = pack(trees, multiple_of=multiple)
    assert packed.num_tokens == tokens
    assert torch.equal(packed.targets, pack(trees).targets)


def test_nothing_is_a_row_of_one_token_of_padding_that_any_network_takes():
    packed = pack([])
    assert (packed.num_tokens, packed.num_owners, len(packed.targets)) == (1, 0, 0)
    assert packed.segments.tolist() == [[0, 1, 0, 0]]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_a_row_moves_with_all_its_tensors():
    moved = pack([document(np.arange(4))]).to("cuda")
    assert {getattr(moved, name).device.type for name in ("ids", "positions", "segments", "predictors", "targets")} == {
        "cuda"
    }
