"""A form in a process of its own: the loss is transformers', the speed belongs to each batch size."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from llmtrain.errors import RunFailed
from llmtrain.optimise import measure
from llmtrain.optimise.measure import FED_TOKENS, Job, in_child, quality
from llmtrain.serving.torch_runtime import load

IDS = tuple(int(number) for number in np.random.default_rng(0).integers(3, 250, 100))


def job(directory: Path) -> Job:
    return Job("torch", str(directory), "fp32", (), 1, (IDS, IDS[:50]), (1, 2), 16, 3)


def test_losses_and_likeliest_tokens_are_those_of_transformers(sources):
    seen = in_child(job(sources("tied")))
    model = AutoModelForCausalLM.from_pretrained(sources("tied"), dtype=torch.float32).eval()
    for number, ids in enumerate((IDS, IDS[:50])):
        with torch.inference_mode():
            found = model(torch.tensor([ids]), labels=torch.tensor([ids]))
        assert seen.losses[number] == pytest.approx(float(found.loss), abs=1e-5)
        assert seen.likeliest[number] == found.logits[0].argmax(-1).tolist()
    assert seen.prefill.keys() == seen.decode.keys() == {"1", "2"}
    assert seen.peak_bytes > 10**8  # PyTorch's code alone


def test_a_document_that_is_fed_in_parts_has_the_same_loss(sources, monkeypatch: pytest.MonkeyPatch):
    runtime = load(sources("tied"), device="cpu", precision="fp32", max_sequences=1, context_tokens=128, threads=1)
    whole = quality(runtime, IDS)
    assert len(IDS) < FED_TOKENS
    for size in (7, 33, 99):  # the last one leaves a part with nothing after it to predict
        monkeypatch.setattr(measure, "FED_TOKENS", size)
        loss, likeliest = quality(runtime, IDS)
        assert loss == pytest.approx(whole[0], abs=1e-6)
        assert likeliest == whole[1]


def test_a_process_that_fails_is_told_with_its_last_lines(tmp_path: Path):
    with pytest.raises(RunFailed, match=r"the process ended with 1:[\s\S]*holds no model.onnx that loads"):
        in_child(replace(job(tmp_path), engine="onnx", providers=("CPUExecutionProvider",)))
