"""How a step is cut (micro-batches, accumulation, chunks of the loss, the attention kernel) changes no loss and no
gradient."""

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import Recorder, fit, in_fp64

from llmtrain.config.compose import load_config
from llmtrain.data.chats import Chat, ChatRows, ChatText, ChatWriter
from llmtrain.data.preferences import Pair, PairText, PairWriter, PreferencePairs
from llmtrain.data.text import ShardWriter, TokenShards
from llmtrain.models.attention import use
from llmtrain.models.build import build
from llmtrain.training.batches import AnswerLogProbs, ChatSteps, PairSteps, TextSteps
from llmtrain.training.evaluation import score_pairs
from llmtrain.training.module import CrossEntropy, DirectPreference, Votes

VOCABULARY = 512
WHOLE = 10**6
CUT = settings(max_examples=10, deadline=None, derandomize=True)
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


COMMON = ("model=qwen3_tiny", "infra.precision=fp32", "trainer.warmup_tokens=0")


def infra_of(config, micro_batch_tokens: int, loss_chunk_tokens: int, padded: bool = False):
    changes = {"micro_batch_tokens": micro_batch_tokens, "loss_chunk_tokens": loss_chunk_tokens, "compile": padded}
    return config.infra.model_copy(update=changes)


def running(network, kernel: str):
    network = copy.deepcopy(network)
    use(network, kernel)
    return network


def assert_equal(cut: Recorder, whole: Recorder, num_steps: int = 2) -> None:
    """Two steps: the second one also shows whether the first left something behind."""
    assert len(cut.losses) == len(whole.losses) == num_steps
    assert cut.losses == pytest.approx(whole.losses, rel=1e-11)
    for ours, theirs in zip(cut.gradients, whole.gradients, strict=True):
        for name, gradient in theirs.items():
            # where each sequence is one token, queries and keys have no gradient but rounding
            assert (ours[name] - gradient).norm() <= 1e-9 * gradient.norm() + 1e-14, name


@given(
    rows=st.integers(1, 8),
    length=st.integers(2, 24),
    documents=st.lists(st.integers(1, 60), min_size=1, max_size=20),
    packing=st.sampled_from(["stream", "documents"]),
    kernel=st.sampled_from(["segments", "sdpa"]),
    padded=st.booleans(),
    micro_batch_tokens=tokens_at_once,
    chunk_tokens=tokens_at_once,
    seed=st.integers(0, 2**32 - 1),
)
@CUT
def test_pretraining_is_the_same_however_a_step_is_cut(
    networks, tmp_path_factory, rows, length, documents, packing, kernel, padded, micro_batch_tokens, chunk_tokens, seed
):
    directory, random = tmp_path_factory.mktemp("shards"), np.random.default_rng(seed)
    writer = ShardWriter(directory, "train", np.dtype("<u2"), shard_tokens=100)
    for size in [*documents, 30]:
        writer.append(random.integers(VOCABULARY, size=size), num_bytes=1)
    writer.close()
    config = load_config([*COMMON, "trainer=pretrain"])
    changes = {"batch_rows": rows, "sequence_tokens": length, "budget_tokens": 2 * rows * length, "seed": seed}
    trainer = config.trainer.model_copy(update=changes)

    def trained(micro_batch_tokens: int, chunk_tokens: int, kernel: str, padded: bool) -> Recorder:
        infra = infra_of(config, micro_batch_tokens, chunk_tokens, padded)
        steps = TextSteps(TokenShards(directory, "train"), trainer, trainer.budget_tokens, packing, infra)
        return fit(CrossEntropy(running(networks[0], kernel), trainer, infra, trainer.budget_tokens), steps)

    assert_equal(trained(micro_batch_tokens, chunk_tokens, kernel, padded), trained(WHOLE, WHOLE, "segments", False))


@given(
    lengths=st.lists(st.integers(2, 24), min_size=2, max_size=12),
    kernel=st.sampled_from(["segments", "sdpa"]),
    micro_batch_tokens=tokens_at_once,
    chunk_tokens=tokens_at_once,
    seed=st.integers(0, 2**32 - 1),
)
@CUT
def test_sft_is_the_same_however_a_step_is_cut(
    networks, tmp_path_factory, lengths, kernel, micro_batch_tokens, chunk_tokens, seed
):
    directory, random = tmp_path_factory.mktemp("chats"), np.random.default_rng(seed)
    writer = ChatWriter(directory, "train", np.dtype("<u2"))
    for length in lengths:
        is_target = random.random(length) < 0.5
        is_target[0], is_target[-1] = False, True
        writer.append(Chat(random.integers(VOCABULARY, size=length), is_target), ChatText("", ""))
    writer.close()
    config = load_config([*COMMON, "trainer=sft", "trainer.epochs=1"])

    def trained(micro_batch_tokens: int, chunk_tokens: int, kernel: str) -> Recorder:
        infra = infra_of(config, micro_batch_tokens, chunk_tokens)
        trainer = config.trainer.model_copy(update={"sequence_tokens": 24, "seed": seed})
        half = -(-len(ChatSteps(ChatRows(directory, "train"), trainer, infra).rows) // 2)
        trainer = trainer.model_copy(update={"batch_rows": half})
        steps = ChatSteps(ChatRows(directory, "train"), trainer, infra)
        module = CrossEntropy(running(networks[0], kernel), trainer, infra, steps.tokens_before(2))
        return fit(module, steps)

    cut, whole = trained(micro_batch_tokens, chunk_tokens, kernel), trained(WHOLE, WHOLE, "segments")
    assert_equal(cut, whole, num_steps=len(whole.losses))


@given(
    lengths=st.lists(st.tuples(st.integers(1, 12), st.integers(1, 12), st.integers(1, 12)), min_size=2, max_size=12),
    loss=st.sampled_from(["sigmoid", "ipo", "hinge", "robust", "simpo", "orpo", "kto", "apo_zero", "apo_down"]),
    kernel=st.sampled_from(["segments", "sdpa"]),
    micro_batch_tokens=tokens_at_once,
    chunk_tokens=tokens_at_once,
    seed=st.integers(0, 2**32 - 1),
)
@settings(CUT, max_examples=20)
def test_preference_tuning_and_its_reference_are_the_same_however_a_step_is_cut(
    networks, tmp_path_factory, lengths, loss, kernel, micro_batch_tokens, chunk_tokens, seed
):
    directory = tmp_path_factory.mktemp("pairs")
    writer, random = PairWriter(directory, "train", np.dtype("<u2")), np.random.default_rng(seed)
    for number, (prompt, chosen, rejected) in enumerate(lengths):
        ids = np.split(random.permutation(VOCABULARY)[: prompt + chosen + rejected], [prompt, prompt + chosen])
        writer.append(Pair(*ids), PairText("", "", "", ""), is_desirable=number % 2 == 0 if loss == "kto" else None)
    writer.close()
    pairs = PreferencePairs(directory, "train")
    config = load_config([*COMMON, "trainer=dpo"])
    half = -(-len(pairs) // 2)  # two steps, the second of which may be smaller
    trainer = config.trainer.model_copy(
        update={"batch_rows": half, "seed": seed, "loss": loss, "sft_weight": 0.2 if loss != "kto" else 0.0}
    )

    def trained(micro_batch_tokens: int, chunk_tokens: int, kernel: str) -> tuple[AnswerLogProbs, Recorder]:
        infra = infra_of(config, micro_batch_tokens, chunk_tokens)
        policy, earlier = (running(network, kernel) for network in networks)
        reference = score_pairs(earlier, pairs, list(range(len(pairs))), infra)
        steps = PairSteps(pairs, reference, trainer, infra)
        kind = Votes if loss == "kto" else DirectPreference
        return reference, fit(kind(policy, trainer, infra, steps.tokens_before(2)), steps)

    reference, cut = trained(micro_batch_tokens, chunk_tokens, kernel)
    whole_reference, whole = trained(WHOLE, WHOLE, "segments")
    torch.testing.assert_close(reference.chosen, whole_reference.chosen, rtol=1e-12, atol=0)
    torch.testing.assert_close(reference.rejected, whole_reference.rejected, rtol=1e-12, atol=0)
    assert_equal(cut, whole)
