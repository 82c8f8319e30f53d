"""Which rows a step trains on, and how it is cut into packed micro-batches."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmtrain.models.attention import dense_mask
from llmtrain.training.batches import (
    AnswerLogProbs,
    ChatSteps,
    PairSteps,
    StepBatch,
    TextSteps,
    balanced,
    packed_documents,
    steps_from,
)
from llmtrain.training.evaluation import preference_figures, score_pairs, vote_figures
from llmtrain.training.module import DirectPreference


def infra_of(config, **changes):
    return config.infra.model_copy(update=changes)


def text_steps(shards, config, packing="stream", **changes) -> TextSteps:
    trainer = config.trainer
    return TextSteps(shards, trainer, trainer.budget_tokens, packing, infra_of(config, **changes))


def rows_of(step: StepBatch) -> list[tuple[int, ...]]:
    """The inputs of each segment of each micro-batch."""
    return [
        tuple(micro.packed.ids[start:stop].tolist())
        for micro in step.micro_batches
        for start, stop, *_ in micro.packed.segments.tolist()
    ]


def by_index(step: StepBatch) -> dict[int, tuple[int, ...]]:
    indices = [index for micro in step.micro_batches for index in micro.indices.tolist()]
    return dict(zip(indices, rows_of(step), strict=True))


def test_each_row_of_a_stream_comes_once_an_epoch(shards, pretrain_config):
    steps = text_steps(shards, pretrain_config)
    assert steps.num_rows == (248 - 1) // 16 == 15
    assert len(steps) == 1_000 // (6 * 16) == 10  # budget, rounded down to whole steps
    rows = [row for step in range(5) for row in rows_of(steps[step])]
    first, second = rows[:15], rows[15:30]
    assert {len(row) for row in rows} == {16}
    assert len(set(first)) == 15
    assert set(first) == set(second)
    assert first != second


def test_a_step_is_cut_into_micro_batches_that_fit_and_is_the_same_rows(shards, pretrain_config):
    cut, whole = (text_steps(shards, pretrain_config, micro_batch_tokens=tokens)[0] for tokens in (40, 1_000))
    assert [micro.packed.num_tokens for micro in cut.micro_batches] == [32, 32, 32]
    assert [micro.packed.num_tokens for micro in whole.micro_batches] == [96]
    assert by_index(cut) == by_index(whole)
    assert (cut.num_units, cut.num_tokens) == (96, 96)


def test_a_loader_begins_at_its_step_and_leaves_the_global_generator_alone(shards, pretrain_config):
    steps = text_steps(shards, pretrain_config)
    state = torch.get_rng_state()
    served = [batch.micro_batches[0].packed.ids for batch in steps_from(steps, 7)]
    assert torch.equal(torch.get_rng_state(), state)
    assert len(served) == 3
    assert torch.equal(served[0], steps[7].micro_batches[0].packed.ids)


@pytest.mark.parametrize("capacity", [2, 16, 40, 200])
def test_each_token_of_a_document_but_its_first_is_a_target_once_an_epoch(shards, capacity):
    """Documents of 40, 1, 130 and 77 tokens: whole where they fit, otherwise in pieces that share one token."""
    rows = packed_documents(shards, capacity)
    targets = sorted(place for row in rows for start, stop in row for place in range(start + 1, stop))
    starts = set(shards.offsets[:-1].tolist())
    assert targets == [place for place in range(248) if place not in starts]
    assert all(0 < sum(stop - start - 1 for start, stop in row) <= capacity for row in rows)
    borders = shards.offsets.tolist()
    for start, stop in (piece for row in rows for piece in row):
        assert any(first <= start and stop <= last for first, last in pairwise(borders)), "a piece is of one document"
    if capacity == 200:
        assert sorted(piece for row in rows for piece in row) == [(0, 40), (41, 171), (171, 248)]


def test_packed_documents_see_themselves_alone_and_the_clock_counts_full_rows(shards, pretrain_config):
    steps = text_steps(shards, pretrain_config, packing="documents")
    assert steps.num_rows == len(packed_documents(shards, 16))
    step = steps[3]
    assert (step.num_tokens, steps.tokens_before(3)) == (96, 288)
    assert step.num_units == sum(len(micro.packed.targets) for micro in step.micro_batches) <= 96
    for micro in step.micro_batches:
        packed = micro.packed
        for start, stop, *_ in packed.segments.tolist():
            assert packed.positions[start:stop].tolist() == list(range(stop - start))
            assert not dense_mask(packed)[start:stop, :start].any()


@pytest.mark.parametrize("packing", ["stream", "documents"])
def test_any_step_is_reached_at_once_and_does_not_depend_on_the_micro_batch(shards, pretrain_config, packing):
    small, large = (text_steps(shards, pretrain_config, packing, micro_batch_tokens=n) for n in (20, 1_000))
    for step in (9, 0, 4):
        chosen, whole = small[step], large[step]
        assert chosen.num_units == whole.num_units
        assert sorted(rows_of(chosen)) == sorted(rows_of(whole))
        assert sorted(indices_of(small, step)) == sorted(indices_of(large, step))


def indices_of(steps: TextSteps, step: int) -> list[int]:
    return [index for micro in steps[step].micro_batches for index in micro.indices.tolist()]


def test_an_epoch_of_chats_has_each_once_and_only_answers_are_targets(chats, sft_config):
    steps = ChatSteps(chats, sft_config.trainer, sft_config.infra)
    per_epoch = len(steps.rows)
    assert sorted(chat for row in steps.rows for chat in row) == list(range(13))
    assert all(sum(chats.num_tokens(chat) for chat in row) <= 32 for row in steps.rows)
    assert len(steps) == -(-per_epoch * 2 // 3)
    assert sorted(steps.order) == sorted([*range(per_epoch)] * 2)
    batches = [steps[step] for step in range(len(steps))]
    assert sum(batch.num_units for batch in batches) == 2 * sum(chats.num_targets(chat) for chat in range(13))
    assert sum(batch.num_tokens for batch in batches) == steps.tokens_before(len(steps))
    assert steps.tokens_before(len(steps)) == 2 * sum(chats.num_tokens(chat) for chat in range(13))
    trained = [target for batch in batches for micro in batch.micro_batches for target in micro.packed.targets.tolist()]
    meant = [chats[chat].ids[chats[chat].is_target].tolist() for chat in range(13)]
    assert sorted(trained) == sorted(2 * [target for targets in meant for target in targets])


sizes = st.lists(st.integers(1, 50), max_size=30)


@given(sizes=sizes, limit=st.integers(1, 120), ranks=st.integers(1, 4))
@settings(deadline=None, derandomize=True)
def test_balanced_groups(sizes, limit, ranks):
    groups = balanced(sizes, limit, ranks)
    totals = [sum(sizes[item] for item in group) for group in groups]
    assert sorted(item for group in groups for item in group) == list(range(len(sizes)))
    assert len(groups) % ranks == 0
    assert len(groups) >= ranks
    assert max(totals) <= max([limit, *sizes])
    assert all(group == sorted(group) for group in groups)
    assert groups == balanced(sizes, limit, ranks)
    if len(groups) > ranks:  # by how much fewer groups could do, each item being at most the limit
        assert sum(sizes) / max([limit, *sizes]) > (len(groups) - ranks) / 2 - ranks


def test_balanced_groups_by_hand():
    assert balanced([5, 5, 5, 5], 10, 1) == [[0, 2], [1, 3]]
    assert balanced([9, 1, 1, 1], 4, 1) == [[0], [1, 2, 3]], (
        "one that is larger than the limit is alone, or not smaller"
    )
    assert balanced([3], 10, 2) == [[0], []]
    assert balanced([], 10, 3) == [[], [], []]


def test_many_items_are_grouped_at_once():
    """As many as a large evaluation has; a list that is searched for its smallest total takes minutes for that."""
    random = np.random.default_rng(0)
    groups = balanced(random.integers(100, 1_500, size=30_000).tolist(), 4_096, 1)
    assert sum(map(len, groups)) == 30_000


def test_pairs_share_their_prompt_in_micro_batches_that_fit(pairs, dpo_config):
    steps = PairSteps(pairs, None, dpo_config.trainer, infra_of(dpo_config, micro_batch_tokens=60))
    for step in range(len(steps)):
        for micro in steps[step].micro_batches:
            members = [pairs[index] for index in micro.indices.tolist()]
            lengths = [len(pair.prompt_ids) + len(pair.chosen_ids) + len(pair.rejected_ids) - 2 for pair in members]
            assert micro.packed.num_tokens == sum(lengths)
            assert sum(lengths) <= 60 or len(lengths) == 1
            expected = [ids.tolist() for pair in members for ids in (pair.chosen_ids, pair.rejected_ids)]
            assert torch.split(micro.packed.targets, micro.packed.counts)[0].tolist() == expected[0]
            assert micro.packed.targets.tolist() == [target for ids in expected for target in ids]
            assert micro.reference.tolist() == [0.0] * 2 * len(members)


def test_a_rank_without_rows_has_one_token_of_padding(shards, pretrain_config):
    step = text_steps(shards, pretrain_config, ranks=4, micro_batch_tokens=1_000)[0]
    assert len(step.micro_batches) == 4
    assert [len(micro.indices) for micro in step.micro_batches] == [2, 2, 1, 1]
    few = text_steps(shards, pretrain_config, ranks=8, micro_batch_tokens=1_000)[0]
    assert [micro.packed.num_tokens for micro in few.micro_batches] == [16] * 6 + [1] * 2


def test_an_answers_log_probability_is_the_sum_of_its_tokens(network, pairs, dpo_config):
    scores = score_pairs(network, pairs, [3, 8], dpo_config.infra)
    for place, index in enumerate([3, 8]):
        pair = pairs[index]
        for answer, found in ((pair.chosen_ids, scores.chosen), (pair.rejected_ids, scores.rejected)):
            ids = torch.cat([torch.from_numpy(pair.prompt_ids), torch.from_numpy(answer)])[None]
            log_probs = network.eval()(input_ids=ids).logits[0].log_softmax(1)
            start = len(pair.prompt_ids)
            expected = sum(log_probs[position - 1, ids[0, position]].item() for position in range(start, ids.shape[1]))
            assert found[place].item() == pytest.approx(expected, abs=1e-3)


def reference_of(network, pairs, config) -> AnswerLogProbs:
    return score_pairs(network, pairs, list(range(len(pairs))), config.infra)


def test_dpo_starts_at_log_two_whatever_the_micro_batches(network, pairs, dpo_config):
    reference = reference_of(network, pairs, dpo_config)
    for tokens in (10, 100, 10_000):
        step = PairSteps(pairs, reference, dpo_config.trainer, infra_of(dpo_config, micro_batch_tokens=tokens))[0]
        module = DirectPreference(network.eval(), dpo_config.trainer, dpo_config.infra, total_tokens=1)
        loss = sum(module.loss(micro, step).item() for micro in step.micro_batches)
        assert loss == pytest.approx(0.6931472, abs=1e-5)


def test_an_epoch_of_pairs_has_each_once_and_the_last_step_may_be_smaller(network, pairs, dpo_config):
    steps = PairSteps(pairs, reference_of(network, pairs, dpo_config), dpo_config.trainer, dpo_config.infra)
    assert len(steps) == 3  # 4 + 4 + 2 pairs
    assert [steps[step].num_units for step in range(3)] == [4, 4, 2]
    assert sorted(steps.order) == list(range(10))
    assert steps.tokens_before(3) == sum(pairs.num_tokens(index) for index in range(10))
    assert sum(steps[step].num_tokens for step in range(3)) == steps.tokens_before(3)
    chosen = [len(pairs[index].chosen_ids) for index in steps.order[:4]]
    assert steps[0].num_chosen_tokens == sum(chosen)


def test_votes_come_with_their_labels_and_answers_to_other_prompts(network, votes, kto_config):
    reference = reference_of(network, votes, kto_config)
    steps = PairSteps(votes, reference, kto_config.trainer, infra_of(kto_config, micro_batch_tokens=60))
    for micro in steps[0].micro_batches:
        members = micro.indices.tolist()
        assert micro.is_desirable.tolist() == [index % 3 != 0 for index in members]
        assert micro.packed.targets.tolist() == [i for index in members for i in votes[index].chosen_ids.tolist()]
        assert micro.mismatched.targets.tolist() == [i for index in members for i in votes[index].rejected_ids.tolist()]
        assert torch.equal(micro.reference, reference.chosen[members])
        assert torch.equal(micro.mismatched_reference, reference.rejected[members])


def test_figures_of_a_policy_equal_to_its_reference(network, pairs, dpo_config):
    reference = reference_of(network, pairs, dpo_config)
    figures = preference_figures(reference, reference, pairs, dpo_config.trainer)
    assert figures["accuracy"] == 0.5
    assert figures["loss"] == pytest.approx(0.6931472)
    assert (figures["margin"], figures["chosen_logp_change"]) == (0.0, 0.0)


def test_figures_of_votes_by_hand(network, votes, kto_config):
    """Ratios of +1 for all, baseline 0: desirable ones (6 of 10) are right, and the loss is sigmoid(-+beta)."""
    reference = reference_of(network, votes, kto_config)
    policy = AnswerLogProbs(reference.chosen + 1, reference.rejected)
    figures = vote_figures(policy, reference, votes, kto_config.trainer)
    low, high = 1 / (1 + np.exp(0.1)), 1 / (1 + np.exp(-0.1))
    assert figures["accuracy"] == pytest.approx(0.6)
    assert figures["loss"] == pytest.approx(0.6 * low + 0.4 * high, abs=1e-6)
    assert figures["chosen_logp_change"] == pytest.approx(1, abs=1e-5)
    assert figures["margin"] == pytest.approx(0, abs=1e-5)
