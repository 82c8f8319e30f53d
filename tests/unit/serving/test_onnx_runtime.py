"""ONNX Runtime's runtime against transformers' own forward pass; quantised forms against themselves, row by row."""

from pathlib import Path

import numpy as np
import onnx
import pytest
from tiny_models import CONTEXT, VOCABULARY, generated, logprobs, onnx_of, reference

from llmtrain.errors import CheckpointMismatch, UnsupportedModel, UserError
from llmtrain.serving import onnx_runtime
from llmtrain.serving.onnx_runtime import OnnxRuntime

MOST = 1e-5
"""Nats, in fp32."""


def load(directory: Path, **changes) -> OnnxRuntime:
    settings = {"providers": ["CPUExecutionProvider"], "threads": 1, "max_sequences": 4, "context_tokens": CONTEXT}
    return onnx_runtime.load(directory, **settings | changes)


@pytest.fixture(scope="module")
def converted(directory: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return onnx_of(directory, "fp32", tmp_path_factory.mktemp("onnx"))


@pytest.fixture(scope="module")
def runtime(converted: Path) -> OnnxRuntime:
    return load(converted)


@pytest.fixture(autouse=True)
def _empty(request: pytest.FixtureRequest):
    yield
    if "runtime" in request.fixturenames:
        for slot in range(4):
            request.getfixturevalue("runtime").drop(slot)


def ids_of(number: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(VOCABULARY, size=number).tolist()


def test_fed_whole_or_in_chunks_it_is_transformers_own_forward_pass(
    directory: Path, runtime: OnnxRuntime, monkeypatch: pytest.MonkeyPatch
):
    ids = ids_of(150)
    expected = reference(directory, ids)
    assert np.abs(logprobs(runtime.feed(0, ids, "all")) - expected).max() <= MOST
    chunks = np.concatenate([runtime.feed(2, ids[start : start + 40], "all") for start in range(0, 150, 40)])
    assert np.abs(logprobs(chunks) - expected).max() <= MOST
    monkeypatch.setattr(onnx_runtime, "FED_TOKENS", 64)
    assert np.abs(logprobs(runtime.feed(1, ids, "all")) - expected).max() <= MOST
    assert np.abs(logprobs(runtime.feed(3, ids, "last")) - expected[-1]).max() <= MOST


def test_only_wanted_logits_are_given(runtime: OnnxRuntime):
    assert runtime.feed(0, ids_of(4), "none").shape == (0, VOCABULARY)
    last = runtime.feed(0, ids_of(4), "last")
    assert (last.shape, last.dtype) == ((1, VOCABULARY), np.float32)


def test_sequences_of_different_lengths_are_stepped_together_as_each_alone(directory: Path, runtime: OnnxRuntime):
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


def test_greedy_tokens_are_those_of_generate_while_sequences_come_and_go(directory: Path, runtime: OnnxRuntime):
    prompts = {slot: ids_of(length, slot) for slot, length in enumerate((5, 40, 17, 1))}
    written = {}
    for slot, ids in prompts.items():  # each joins while those before it go on; the first leaves in between
        written[slot] = [int(runtime.feed(slot, ids, "last").argmax())]
        going = list(written)
        if slot == 3:
            runtime.drop(0)
            going.remove(0)
        for _ in range(8):
            for one, row in zip(going, runtime.step(going, [written[one][-1] for one in going]), strict=True):
                written[one].append(int(row.argmax()))
    assert [len(ids) for ids in written.values()] == [25, 25, 17, 9]
    assert written == {slot: generated(directory, prompts[slot], len(ids)) for slot, ids in written.items()}


def test_what_exceeds_the_context_is_refused_and_the_sequence_goes_on(directory: Path, converted: Path):
    runtime, ids = load(converted, context_tokens=20), ids_of(20)
    runtime.feed(0, ids[:19], "none")
    with pytest.raises(ValueError, match="21 tokens in a sequence, of which the context has 20"):
        runtime.feed(0, [1, 2], "last")
    assert np.abs(logprobs(runtime.step([0], ids[19:])) - reference(directory, ids)[-1]).max() <= MOST


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_quantised_rows_do_not_depend_on_each_other(qwen3_directory: Path, tmp_path: Path, precision: str):
    runtime = load(onnx_of(qwen3_directory, precision, tmp_path))
    sequences, alone = {0: ids_of(70, 1), 1: ids_of(3, 2), 2: ids_of(20, 3)}, {}
    for slot, ids in sequences.items():
        fed = logprobs(runtime.feed(slot, ids, "last"))[0]
        alone[slot] = fed, logprobs(runtime.step([slot], [5]))[0]
        runtime.drop(slot)
    for slot, ids in sequences.items():
        assert np.array_equal(logprobs(runtime.feed(slot, ids, "last"))[0], alone[slot][0])
    for row, slot in zip(logprobs(runtime.step([2, 0, 1], [5] * 3)), [2, 0, 1], strict=True):
        assert np.abs(row - alone[slot][1]).max() <= MOST
    assert np.abs(alone[0][0] - reference(qwen3_directory, sequences[0])[-1]).max() > 100 * MOST, "it is quantised"


def test_a_graph_that_does_not_end_in_a_product_is_run_as_it_is(
    directory: Path, converted: Path, runtime: OnnxRuntime, tmp_path: Path
):
    model = onnx.load(converted / "model.onnx")
    next(node for node in model.graph.node if "logits" in node.output).output[0] = "product"
    model.graph.node.append(onnx.helper.make_node("Identity", ["product"], ["logits"]))
    onnx.save(model, tmp_path / "model.onnx")
    (tmp_path / "config.json").write_bytes((converted / "config.json").read_bytes())
    other, ids = load(tmp_path), ids_of(30)
    assert (runtime._with_wanted, other._with_wanted) == (True, False)
    assert np.abs(logprobs(other.feed(0, ids[:-1], "last")) - reference(directory, ids)[-2]).max() <= MOST
    assert np.abs(logprobs(other.step([0], ids[-1:])) - reference(directory, ids)[-1]).max() <= MOST


def test_graphs_of_another_form_are_refused(tmp_path: Path, qwen3_directory: Path):
    (tmp_path / "config.json").write_bytes((qwen3_directory / "config.json").read_bytes())
    with pytest.raises(CheckpointMismatch, match=r"no model.onnx that loads.*llmtrain optimise"):
        load(tmp_path)
    value = onnx.helper.make_tensor_value_info("pixels", onnx.TensorProto.FLOAT, [1])
    out = onnx.helper.make_tensor_value_info("logits", onnx.TensorProto.FLOAT, [1])
    graph = onnx.helper.make_graph([onnx.helper.make_node("Relu", ["pixels"], ["logits"])], "other", [value], [out])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, tmp_path / "model.onnx")
    with pytest.raises(UnsupportedModel, match=r"pixels, attention_mask, input_ids, past_key_values"):
        load(tmp_path)


def test_missing_providers_and_contexts_are_named(converted: Path):
    with pytest.raises(UserError, match=r"has no RocketExecutionProvider here, only .*CPUExecutionProvider"):
        load(converted, providers=["RocketExecutionProvider"])
    with pytest.raises(UserError, match=f"257 tokens is asked for, and the model has {CONTEXT}"):
        load(converted, context_tokens=CONTEXT + 1)
