"""PyTorch's runtime against transformers' own forward pass and `generate`."""

from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_models import CONTEXT, SIZES, VOCABULARY, generated, logprobs, reference, save
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from llmtrain.errors import CheckpointMismatch, UnsupportedModel, UserError
from llmtrain.serving import torch_runtime
from llmtrain.serving.torch_runtime import TorchRuntime

MOST = 1e-5
"""Nats, in fp32."""


def load(directory: Path, **changes) -> TorchRuntime:
    settings = {"device": "cpu", "precision": "fp32", "max_sequences": 4, "context_tokens": CONTEXT, "threads": 1}
    return torch_runtime.load(directory, **settings | changes)


@pytest.fixture(scope="module")
def runtime(directory: Path) -> TorchRuntime:
    return load(directory)


@pytest.fixture(autouse=True)
def _empty(request: pytest.FixtureRequest):
    yield
    if "runtime" in request.fixturenames:
        for slot in range(4):
            request.getfixturevalue("runtime").drop(slot)


def ids_of(number: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(VOCABULARY, size=number).tolist()


def test_fed_whole_or_in_chunks_it_is_transformers_own_forward_pass(directory: Path, runtime: TorchRuntime):
    ids = ids_of(150)
    whole = logprobs(runtime.feed(0, ids, "all"))
    chunks = np.concatenate([runtime.feed(2, ids[start : start + 40], "all").copy() for start in range(0, 150, 40)])
    expected = reference(directory, ids)
    assert np.abs(whole - expected).max() <= MOST
    assert np.abs(logprobs(chunks) - expected).max() <= MOST


def test_only_wanted_logits_are_given(directory: Path, runtime: TorchRuntime):
    ids = ids_of(9)
    assert runtime.feed(0, ids[:4], "none").shape == (0, VOCABULARY)
    last = runtime.feed(0, ids[4:], "last")
    assert (last.shape, last.dtype) == ((1, VOCABULARY), np.float32)
    assert np.abs(logprobs(last) - reference(directory, ids)[-1]).max() <= MOST


def test_several_are_fed_at_once_as_each_alone(directory: Path, runtime: TorchRuntime):
    first, second, third = ids_of(40, 1), ids_of(70, 2), ids_of(1, 3)
    runtime.feed(1, second[:30], "none")
    parts = [(0, first, "all"), (1, second[30:], "none"), (3, third, "last")]
    found = [logprobs(one) for one in runtime.feed_each(parts)]
    assert [len(one) for one in found] == [40, 0, 1]
    assert np.abs(found[0] - reference(directory, first)).max() <= MOST
    assert np.abs(found[2] - reference(directory, third)).max() <= MOST
    stepped = logprobs(runtime.step([1, 0], [5, 6]))
    assert np.abs(stepped[0] - reference(directory, [*second, 5])[-1]).max() <= MOST
    assert np.abs(stepped[1] - reference(directory, [*first, 6])[-1]).max() <= MOST
    with pytest.raises(ValueError, match="one after the other"):
        runtime.feed_each([(0, [1], "none"), (0, [2], "none")])


def test_sequences_of_different_lengths_are_stepped_together_as_each_alone(directory: Path, runtime: TorchRuntime):
    sequences = {2: ids_of(100, 1), 0: ids_of(3, 2), 3: ids_of(61, 3)}
    for slot, ids in sequences.items():
        runtime.feed(slot, ids, "none")
    for count in range(8):  # the longest but one outgrows 64 tokens
        new = ids_of(3, 10 + count)
        order = [[2, 0, 3], [0, 3, 2], [3, 2, 0]][count % 3]
        found = logprobs(runtime.step(order, new))
        for row, slot, token in zip(found, order, new, strict=True):
            sequences[slot].append(token)
            assert np.abs(row - reference(directory, sequences[slot])[-1]).max() <= MOST


def test_sequences_of_equal_lengths_are_stepped_together_as_each_alone(directory: Path, runtime: TorchRuntime):
    sequences = {3: ids_of(64, 1), 1: ids_of(64, 2)}
    for slot, ids in sequences.items():
        runtime.feed(slot, ids, "none")
    for new in ([5, 6], [7, 8]):
        found = logprobs(runtime.step([1, 3], new))
        for row, slot, token in zip(found, [1, 3], new, strict=True):
            sequences[slot].append(token)
            assert np.abs(row - reference(directory, sequences[slot])[-1]).max() <= MOST


def test_greedy_tokens_are_those_of_generate(directory: Path, runtime: TorchRuntime):
    prompts = {slot: ids_of(length, slot) for slot, length in enumerate((5, 40, 17, 1))}
    written = {slot: [int(runtime.feed(slot, ids, "last").argmax())] for slot, ids in prompts.items()}
    for _ in range(24):
        for slot, row in zip(prompts, runtime.step(list(prompts), [written[s][-1] for s in prompts]), strict=True):
            written[slot].append(int(row.argmax()))
    assert written == {slot: generated(directory, ids, 25) for slot, ids in prompts.items()}


def test_feeding_one_sequence_between_the_steps_of_others(directory: Path, runtime: TorchRuntime):
    first, second, third = ids_of(30, 1), ids_of(8, 2), ids_of(20, 3)
    for slot, ids in ((0, first), (1, second)):
        runtime.feed(slot, ids, "none")
    runtime.drop(0)
    runtime.feed(2, third[:9], "none")  # in the row that the dropped one left, before that of those that are stepped
    stepped = runtime.step([1], [7])
    assert np.abs(logprobs(stepped) - reference(directory, [*second, 7])[-1]).max() <= MOST
    fed = runtime.feed(2, third[9:], "last")
    assert np.abs(logprobs(fed) - reference(directory, third)[-1]).max() <= MOST
    both = logprobs(runtime.step([2, 1], [4, 5]))
    assert np.abs(both[0] - reference(directory, [*third, 4])[-1]).max() <= MOST
    assert np.abs(both[1] - reference(directory, [*second, 7, 5])[-1]).max() <= MOST


def test_nothing_of_a_dropped_sequence_reaches_another(directory: Path, runtime: TorchRuntime):
    long, short = ids_of(50, 1), ids_of(5, 2)
    runtime.feed(0, long, "none")
    runtime.feed(1, long, "none")
    with torch.inference_mode():
        for array in runtime._slots.arrays:
            array[0, :, :50] = torch.nan  # as a diverged model leaves it
    runtime.drop(0)
    runtime.feed(0, short, "none")
    found = logprobs(runtime.step([0, 1], [3, 4]))
    assert np.abs(found[0] - reference(directory, [*short, 3])[-1]).max() <= MOST
    assert np.abs(found[1] - reference(directory, [*long, 4])[-1]).max() <= MOST


def test_what_exceeds_the_context_is_refused_and_the_sequence_goes_on(directory: Path):
    runtime, ids = load(directory, context_tokens=20), ids_of(20)
    runtime.feed(0, ids[:19], "none")
    with pytest.raises(ValueError, match="21 tokens in a sequence, of which the context has 20"):
        runtime.feed(0, [1, 2], "last")
    assert np.abs(logprobs(runtime.step([0], ids[19:])) - reference(directory, ids)[-1]).max() <= MOST
    with pytest.raises(ValueError, match="21 tokens"):
        runtime.step([0], [1])


def test_bf16_is_transformers_in_bf16(qwen3_directory: Path):
    ids = ids_of(60)
    model = AutoModelForCausalLM.from_pretrained(qwen3_directory, dtype=torch.bfloat16)
    with torch.no_grad():
        expected = model(input_ids=torch.tensor([ids])).logits[0].float().log_softmax(-1).numpy()
    runtime = load(qwen3_directory, precision="bf16")
    found = logprobs(runtime.feed(0, ids, "all"))
    assert np.abs(found - expected).mean() < np.abs(reference(qwen3_directory, ids) - expected).mean() / 2


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize(("precision", "most"), [("fp32", 1e-3), ("bf16", 0.3)])
def test_on_cuda_it_is_the_same(qwen3_directory: Path, precision: str, most: float):
    runtime = load(qwen3_directory, device="cuda", precision=precision)
    sequences = {0: ids_of(90, 1), 1: ids_of(7, 2)}
    for slot, ids in sequences.items():
        fed = np.concatenate([runtime.feed(slot, ids[:5], "all"), runtime.feed(slot, ids[5:], "all")])
        assert np.abs(logprobs(fed) - reference(qwen3_directory, ids)).max() <= most
    found = logprobs(runtime.step([1, 0], [3, 4]))
    assert np.abs(found[0] - reference(qwen3_directory, [*sequences[1], 3])[-1]).max() <= most
    assert np.abs(found[1] - reference(qwen3_directory, [*sequences[0], 4])[-1]).max() <= most


TINY = SIZES | {"hidden_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda: MistralForCausalLM(MistralConfig(**TINY, sliding_window=8)), "sliding_window=8"),
        (
            lambda: Qwen3ForCausalLM(
                Qwen3Config(**TINY, use_sliding_window=True, sliding_window=8, max_window_layers=1)
            ),
            "full_attention, sliding_attention",
        ),
        (lambda: LlamaForCausalLM(LlamaConfig(**TINY, rope_parameters=DYNAMIC)), "rope_type=dynamic"),
        (lambda: GPT2LMHeadModel(GPT2Config(vocab_size=64, n_positions=64, n_embd=16, n_layer=1, n_head=2)), "GPT2"),
    ],
)
def test_models_that_need_what_it_has_not_are_refused(tmp_path: Path, model, message: str):
    with pytest.raises(UnsupportedModel, match=f"{message}.*vLLM"):
        load(save(model(), tmp_path), context_tokens=64)


def test_a_model_that_computes_something_else_here_is_refused(qwen3_directory: Path, monkeypatch: pytest.MonkeyPatch):
    def careless(module, query, key, value, attention_mask, **others):
        return torch.zeros_like(query).transpose(1, 2), None

    monkeypatch.setattr(torch_runtime, "slot_attention", careless)
    with pytest.raises(UnsupportedModel, match=r"log-probabilities differ by .* of which 0.0001 is allowed"):
        load(qwen3_directory)


def test_wrong_places_are_named_with_the_remedy(qwen3_directory: Path, tmp_path: Path):
    with pytest.raises(CheckpointMismatch, match="holds no model that loads"):
        load(tmp_path)
    with pytest.raises(UserError, match=f"257 tokens is asked for, and the model has {CONTEXT}"):
        load(qwen3_directory, context_tokens=CONTEXT + 1)
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="serve on cpu"):
            load(qwen3_directory, device="cuda")
