"""How a step is cut (micro-batches, accumulation, chunks of the loss) changes neither losses nor gradients."""

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import Recorder, fit, in_fp64

from llmtrain.config.compose import load_config
from llmtrain.data.preferences import Pair, PairText, PairWriter, PreferencePairs
from llmtrain.data.text import ShardWriter, TokenShards
from llmtrain.models.build import build
from llmtrain.training.batches import AnswerLogProbs, PairSteps, TextSteps
from llmtrain.training.evaluation import score_pairs
from llmtrain.training.module import DirectPreference, Pretraining

VOCABULARY = 512
WHOLE = 10**6
CUT = settings(max_examples=30, deadline=None, derandomize=True)
tokens_at_once = st.integers(1, 300)


@pytest.fixture(scope="module")
def networks():
    """A policy and its reference."""
    shape = load_config(["model=qwen3_tiny"]).model
    found = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        found.append(in_fp64(build(shape)))
    return found


@pytest.fixture(scope="module")
def configs():
    common = ["model=qwen3_tiny", "infra.precision=fp32", "trainer.warmup_tokens=0"]
    return load_config(common), load_config([*common, "trainer=dpo"])


def infra_of(config, micro_batch_tokens: int, loss_chunk_tokens: int):
    changes = {"micro_batch_tokens": micro_batch_tokens, "loss_chunk_tokens": loss_chunk_tokens}
    return config.infra.model_copy(update=changes)


def assert_equal(cut: Recorder, whole: Recorder) -> None:
    """Two steps: the second one also shows whether the first left something behind."""
    assert len(cut.losses) == len(whole.losses) == 2
    assert cut.losses == pytest.approx(whole.losses, rel=1e-12)
    for ours, theirs in zip(cut.gradients, whole.gradients, strict=True):
        for name, gradient in theirs.items():
            assert (ours[name] - gradient).norm() <= 1e-9 * gradient.norm(), name


@given(
    rows=st.integers(1, 8),
    length=st.integers(2, 24),
    micro_batch_tokens=tokens_at_once,
    chunk_tokens=tokens_at_once,
    seed=st.integers(0, 2**32 - 1),
)
@CUT
def test_pretraining_is_the_same_however_a_step_is_cut(
    networks, configs, tmp_path_factory, rows, length, micro_batch_tokens, chunk_tokens, seed
):
    directory = tmp_path_factory.mktemp("shards")
    writer = ShardWriter(directory, "train", np.dtype("<u2"), shard_tokens=100)
    writer.append(np.random.default_rng(seed).permutation(VOCABULARY), num_bytes=1)
    writer.close()
    config, _ = configs
    changes = {"batch_rows": rows, "sequence_tokens": length, "budget_tokens": 2 * rows * length, "seed": seed}
    trainer = config.trainer.model_copy(update=changes)

    def trained(micro_batch_tokens: int, chunk_tokens: int) -> Recorder:
        infra = infra_of(config, micro_batch_tokens, chunk_tokens)
        steps = TextSteps(TokenShards(directory, "train"), trainer, infra.micro_batch_tokens)
        return fit(Pretraining(copy.deepcopy(networks[0]), trainer, infra, trainer.budget_tokens), steps)

    assert_equal(trained(micro_batch_tokens, chunk_tokens), trained(WHOLE, WHOLE))


@given(
    lengths=st.lists(st.tuples(st.integers(2, 12), st.integers(1, 12), st.integers(1, 12)), min_size=2, max_size=12),
    micro_batch_tokens=tokens_at_once,
    chunk_tokens=tokens_at_once,
    seed=st.integers(0, 2**32 - 1),
)
@CUT
def test_dpo_and_its_reference_are_the_same_however_a_step_is_cut(
    networks, configs, tmp_path_factory, lengths, micro_batch_tokens, chunk_tokens, seed
):
    directory = tmp_path_factory.mktemp("pairs")
    writer, random = PairWriter(directory, "train", np.dtype("<u2")), np.random.default_rng(seed)
    for prompt, chosen, rejected in lengths:
        ids = np.split(random.permutation(VOCABULARY)[: prompt + chosen + rejected], [prompt, prompt + chosen])
        writer.append(Pair(*ids), PairText("", "", "", ""))
    writer.close()
    pairs = PreferencePairs(directory, "train")
    _, config = configs
    half = -(-len(pairs) // 2)  # two steps, the second of which may be smaller
    trainer = config.trainer.model_copy(update={"batch_rows": half, "seed": seed})

    def trained(micro_batch_tokens: int, chunk_tokens: int) -> tuple[AnswerLogProbs, Recorder]:
        policy, infra = copy.deepcopy(networks[0]), infra_of(config, micro_batch_tokens, chunk_tokens)
        reference = score_pairs(networks[1], pairs, list(range(len(pairs))), infra)
        steps = PairSteps(pairs, reference, trainer, infra.micro_batch_tokens)
        return reference, fit(DirectPreference(policy, trainer, infra, steps.tokens_before(2)), steps)

    reference, cut = trained(micro_batch_tokens, chunk_tokens)
    whole_reference, whole = trained(WHOLE, WHOLE)
    torch.testing.assert_close(reference.chosen, whole_reference.chosen, rtol=1e-12, atol=0)
    torch.testing.assert_close(reference.rejected, whole_reference.rejected, rtol=1e-12, atol=0)
    assert_equal(cut, whole)
