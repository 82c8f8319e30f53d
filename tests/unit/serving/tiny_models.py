"""Models with far from uniform answers, so small that a test costs milliseconds; and what transformers says of them."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

os.environ.setdefault("HF_HUB_OFFLINE", "1")

VOCABULARY = 512
CONTEXT = 256
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": CONTEXT,
    "bos_token_id": None,
    "eos_token_id": None,
}


def save(model: PreTrainedModel, directory: Path) -> Path:
    """Write `model` with weights so large that its answers depend on every token."""
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.uniform_(0.5, 1.5) if "norm" in name else parameter.normal_(0, 0.1)
    model.save_pretrained(directory)
    return directory


_LOADED: dict[Path, PreTrainedModel] = {}


def onnx_of(directory: Path, precision: str, into: Path) -> Path:
    """What onnxruntime-genai's builder makes of a directory."""
    from onnxruntime_genai.models.builder import create_model, parse_extra_options

    cache = str(into / "cache")
    options = parse_extra_options("", str(directory), str(into), precision, "cpu", cache, ["hf_token=false"])
    create_model("", str(directory), str(into), precision, "cpu", cache, **options)
    (into / "config.json").write_bytes((directory / "config.json").read_bytes())
    return into


def reference(directory: Path, ids: list[int]) -> np.ndarray:
    """transformers' own log-probabilities [tokens, vocabulary]."""
    if directory not in _LOADED:
        _LOADED[directory] = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    with torch.no_grad():
        return _LOADED[directory](input_ids=torch.tensor([ids])).logits[0].log_softmax(-1).numpy()


def generated(directory: Path, ids: list[int], number: int) -> list[int]:
    """transformers' own greedy tokens."""
    reference(directory, ids)
    with torch.no_grad():
        whole = _LOADED[directory].generate(
            torch.tensor([ids]), max_new_tokens=number, min_new_tokens=number, do_sample=False, pad_token_id=0
        )
    return whole[0, len(ids) :].tolist()


def logprobs(logits: np.ndarray) -> np.ndarray:
    """A copy, as log-probabilities."""
    return torch.from_numpy(logits.copy()).log_softmax(-1).numpy()
