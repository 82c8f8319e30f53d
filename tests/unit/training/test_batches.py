"""Which rows a step trains on, and how it is cut into micro-batches."""

import pytest
import torch

from llmtrain.training.batches import AnswerLogProbs, PairSteps, TextSteps, longest_first, pair_rows, steps_from
from llmtrain.training.evaluation import preference_figures, score_pairs
from llmtrain.training.module import DirectPreference


def test_each_row_of_the_corpus_comes_once_an_epoch(shards, pretrain_config):
    steps = TextSteps(shards, pretrain_config.trainer, micro_batch_tokens=32)
    assert steps.num_rows == (248 - 1) // 16 == 15
    assert len(steps) == 1_000 // (6 * 16) == 10  # budget, rounded down to whole steps
    rows = [tuple(row.tolist()) for step in range(5) for micro in steps[step].micro_batches for row in micro.ids]
    first, second = rows[:15], rows[15:30]
    assert len(set(first)) == 15
    assert set(first) == set(second)
    assert first != second


def test_a_step_is_cut_into_micro_batches_that_fit(shards, pretrain_config):
    step = TextSteps(shards, pretrain_config.trainer, micro_batch_tokens=64)[0]
    assert [len(micro.ids) for micro in step.micro_batches] == [4, 2]
    assert (step.num_units, step.num_tokens) == (96, 96)


def test_a_loader_begins_at_its_step_and_leaves_the_global_generator_alone(shards, pretrain_config):
    steps = TextSteps(shards, pretrain_config.trainer, micro_batch_tokens=1_000)
    state = torch.get_rng_state()
    served = [batch.micro_batches[0].ids for batch in steps_from(steps, 7)]
    assert torch.equal(torch.get_rng_state(), state)
    assert len(served) == 3
    assert torch.equal(served[0], steps[7].micro_batches[0].ids)


def test_pairs_come_longest_first_in_micro_batches_that_fit(pairs):
    indices = [7, 2, 5, 0, 9]
    lengths = [len(pairs[i].prompt_ids) + max(len(pairs[i].chosen_ids), len(pairs[i].rejected_ids)) for i in indices]
    batches = list(pair_rows(pairs, indices, micro_batch_tokens=120, reference=None))
    assert sum(len(batch.ids) for batch in batches) == 2 * len(indices)
    assert all(batch.ids.numel() <= 120 or len(batch.ids) == 2 for batch in batches)
    assert batches[0].ids.shape[1] == max(lengths)
    assert [lengths[indices.index(i)] for i in longest_first(pairs, indices)] == sorted(lengths, reverse=True)


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
        step = PairSteps(pairs, reference, dpo_config.trainer, tokens)[0]
        module = DirectPreference(network.eval(), dpo_config.trainer, dpo_config.infra, total_tokens=1)
        loss = sum(module.loss(micro, step.num_units).item() for micro in step.micro_batches)
        assert loss == pytest.approx(0.6931472, abs=1e-5)


def test_an_epoch_of_pairs_has_each_once_and_the_last_step_may_be_smaller(network, pairs, dpo_config):
    steps = PairSteps(pairs, reference_of(network, pairs, dpo_config), dpo_config.trainer, 10_000)
    assert len(steps) == 3  # 4 + 4 + 2 pairs
    assert [steps[step].num_units for step in range(3)] == [4, 4, 2]
    assert sorted(steps.order) == list(range(10))
    assert steps.tokens_before(3) == sum(pairs.num_tokens(index) for index in range(10))
    assert sum(steps[step].num_tokens for step in range(3)) == steps.tokens_before(3)


def test_figures_of_a_policy_equal_to_its_reference(network, pairs, dpo_config):
    reference = reference_of(network, pairs, dpo_config)
    figures = preference_figures(reference, reference, beta=0.1)
    assert figures["accuracy"] == 0.5
    assert figures["loss"] == pytest.approx(0.6931472)
    assert (figures["margin"], figures["chosen_logp_change"]) == (0.0, 0.0)
