"""Scores against transformers' logits, and roundings against numbers found by hand."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from llmtrain.artifacts import OptimisedModel
from llmtrain.errors import UnsupportedModel
from llmtrain.evaluation import reference as module
from llmtrain.evaluation.parity import Reference
from llmtrain.evaluation.reference import runtime_scores, scores
from llmtrain.evaluation.rounding import Rounding, nearest, precision_of, rounded
from llmtrain.serving import torch_runtime


@torch.no_grad()
def plain(model: Any, ids: tuple[int, ...]) -> tuple[list[float], list[int]]:
    logits = model(input_ids=torch.tensor([ids])).logits[0, :-1]
    own = logits.log_softmax(dim=-1).gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
    return own.tolist(), logits.argmax(dim=-1).tolist()


def test_scores_are_those_of_transformers(reference: Reference, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CHUNK_TOKENS", 100)  # long rows have several chunks, their last a short one
    monkeypatch.setattr(module, "BATCH_TOKENS", 600)  # several batches, of several rows
    rows = [*reference.ids, reference.ids[0][:2]]
    for ids, found in zip(rows, scores(reference.model, rows), strict=True):
        own, top = plain(reference.model, ids)
        assert np.abs(np.subtract(found.logprobs, own)).max() < 1e-5
        assert list(found.top_ids) == top


def test_a_runtime_that_is_fed_scores_the_same(reference: Reference, trained: Path) -> None:
    runtime = torch_runtime.load(
        trained / "model", device="cpu", precision="fp32", max_sequences=1, context_tokens=256, threads=1
    )
    rows = [ids for ids in reference.ids if len(ids) > 2][:6]
    for ids, found in zip(rows, runtime_scores(runtime, rows), strict=True):
        own, top = plain(reference.model, ids)
        assert np.abs(np.subtract(found.logprobs, own)).max() < 1e-5
        assert list(found.top_ids) == top


def test_nearest_levels() -> None:
    """Four bits over -1 to 2: a scale of 0.2, -1 is -5 of it, 0.31 the second (0.4), 2 the tenth; over 0 to 15: 1."""
    values = torch.tensor([[-1.0, 0.31, 2.0, 0.0, 15.0, 0.6]])
    assert nearest(values, 3, 4)[0].tolist() == pytest.approx([-1.0, 0.4, 2.0, 0.0, 15.0, 1.0])
    assert nearest(values, 4, 4)[0, 4:].tolist() == pytest.approx([15.0, 1.0]), "the last block may be short"
    assert nearest(torch.zeros(1, 4), 4, 4).tolist() == [[0.0] * 4]


def test_int4_has_sixteen_values_a_block_and_a_tied_head_of_its_own_bits(reference: Reference) -> None:
    copy = rounded(reference.model, Rounding(bits=4, block=32, head_bits=8, products="fp32"))
    weight = copy.model.layers[0].mlp.gate_proj.weight
    assert weight.view(-1, 32).unique(dim=0).shape[0] > 1
    assert max(len(block.unique()) for block in weight.view(-1, 32)) <= 16
    head = copy.lm_head.weight
    assert 16 < max(len(block.unique()) for block in head.view(-1, 32)) <= 32
    assert head is copy.model.embed_tokens.weight
    assert not torch.equal(head, reference.model.lm_head.weight)
    untouched = rounded(reference.model, Rounding(bits=4, block=32, head_bits=None, products="fp32"))
    assert torch.equal(untouched.lm_head.weight, reference.model.lm_head.weight)


def test_bf16_keeps_the_rotary_frequencies(reference: Reference) -> None:
    copy = rounded(reference.model, "bf16")
    assert {parameter.dtype for parameter in copy.parameters()} == {torch.bfloat16}
    assert copy.model.rotary_emb.inv_freq.dtype == torch.float32
    assert reference.model.dtype == torch.float32, "the reference itself stays what it is"


def record(form: str, **settings: Any) -> OptimisedModel:
    return OptimisedModel(
        parents=(), form=form, path="optimised/x", source_weights_sha256="", files={}, settings=settings, num_bytes=0,
        metrics={},
    )  # fmt: skip


def test_a_form_is_held_against_how_it_was_made() -> None:
    assert precision_of(record("onnx_fp32", block_size=32)) == "fp32"
    int4 = record("onnx_int4", block_size=64, head_bits=8, products="int8", rounding="gptq")
    assert precision_of(int4) == Rounding(4, 64, 8, "int8")
    assert precision_of(record("safetensors_int8", block_size=None)) == Rounding(8, None, None, "bf16")
    with pytest.raises(UnsupportedModel, match="no rule"):
        precision_of(record("onnx_int4", made="elsewhere"))
