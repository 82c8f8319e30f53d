"""Samples: which prompts, and that drawing them leaves no trace in the run."""

import random

import numpy as np
import torch
from transformers import PreTrainedModel

from llmtrain.config.root import TrainConfig
from llmtrain.data.preferences import PreferencePairs
from llmtrain.data.text import ShardWriter, TokenShards
from llmtrain.training.samples import NUM_PROMPTS, PROMPT_TOKENS, TOP_K, continuations, pair_prompts, text_prompts


def test_text_prompts_are_the_beginnings_of_documents(shards: TokenShards):
    documents = [shards.document(index)[:-1] for index in range(4)]  # 40, 1, 130 and 77 tokens with end-of-text
    prompts = text_prompts(shards)
    assert [len(prompt) for prompt in prompts] == [32, 32, 32], "the second is empty without its end-of-text"
    for prompt, document in zip(prompts, (documents[0], documents[2], documents[3]), strict=True):
        assert np.array_equal(prompt, document[:PROMPT_TOKENS])


def test_one_long_document_gives_passages_spread_over_it(tmp_path):
    writer = ShardWriter(tmp_path, "validation", np.dtype("<u2"), shard_tokens=1000)
    writer.append(range(400), num_bytes=400)
    writer.close()
    firsts = [prompt[0] for prompt in text_prompts(TokenShards(tmp_path, "validation"))]
    assert firsts == [0, 96, 192, 288]  # of 12 rows of 32 tokens the rows 0, 3, 6 and 9


def test_pair_prompts_are_different_and_spread(pairs: PreferencePairs):
    prompts = pair_prompts(pairs)
    assert [prompt.tolist() for prompt in prompts] == [pairs[index].prompt_ids.tolist() for index in (0, 2, 5, 7)]


def test_a_prompt_that_several_pairs_share_comes_once(tmp_path, pairs: PreferencePairs):
    class Same(PreferencePairs):
        def __getitem__(self, index):
            return super().__getitem__(0)

    assert len(pair_prompts(Same(tmp_path, "train"))) == 1


def test_equal_seeds_give_equal_tokens_and_no_generator_moves(network: PreTrainedModel, pretrain_config: TrainConfig):
    prompts = [np.arange(1, 20), np.arange(7)]
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    drawn = [continuations(network, prompts, 12, seed=seed, infra=pretrain_config.infra) for seed in (3, 3, 4)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert [len(ids) for ids in drawn[0]] == [12, 12]
    assert torch.equal(before[0], torch.get_rng_state())
    assert (before[1], before[2]) == (random.getstate(), np.random.get_state()[1].tolist())


def test_drawn_tokens_are_among_the_likeliest_whatever_the_padding(
    network: PreTrainedModel, pretrain_config: TrainConfig
):
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.mul_(3)  # far from uniform, so that a wrong position or a token of padding would show
    network.eval()
    prompts = [np.arange(40, 60), np.array([5, 6])]
    for prompt, ids in zip(
        prompts, continuations(network, prompts, 10, seed=0, infra=pretrain_config.infra), strict=True
    ):
        whole = torch.tensor([[*prompt.tolist(), *ids]])
        with torch.no_grad():
            logits = network(input_ids=whole).logits[0, len(prompt) - 1 : -1]
        ranks = (logits > logits.gather(1, torch.tensor(ids)[:, None])).sum(dim=1)
        assert ranks.max() < TOP_K


def test_a_long_prompt_loses_its_beginning(network: PreTrainedModel, pretrain_config: TrainConfig):
    room = network.config.max_position_embeddings - 5
    long = np.arange(300) % 512
    drawn = [
        continuations(network, [prompt], 5, seed=0, infra=pretrain_config.infra) for prompt in (long, long[-room:])
    ]
    assert drawn[0] == drawn[1]


def test_a_model_that_diverged_is_sampled_all_the_same(network: PreTrainedModel, pretrain_config: TrainConfig):
    with torch.no_grad():
        network.model.norm.weight.fill_(torch.nan)
    assert len(continuations(network, [np.arange(4)] * NUM_PROMPTS, 3, seed=0, infra=pretrain_config.infra)) == 4
