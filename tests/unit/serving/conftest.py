"""Tiny models as directories, and their tokenizer."""

from pathlib import Path
from typing import Any

import pytest
from tiny_models import SIZES, VOCABULARY, save
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from llmtrain.data.tokenizer import train_bpe

TEXTS = ["The quick brown fox jumps over the lazy dog. " * 3, "Größe, naïve café, 中文字符 and emoji 🎉🚀 in one line"]


@pytest.fixture(scope="session")
def bpe_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("bpe")
    train_bpe(TEXTS, VOCABULARY, directory)
    return directory


@pytest.fixture(scope="session")
def bpe(bpe_directory: Path) -> Any:
    """A byte-level BPE of about 400 tokens."""
    return AutoTokenizer.from_pretrained(bpe_directory)


@pytest.fixture(scope="session")
def qwen3_directory(tmp_path_factory: pytest.TempPathFactory, bpe: Any) -> Path:
    directory = save(Qwen3ForCausalLM(Qwen3Config(**SIZES)), tmp_path_factory.mktemp("qwen3"))
    bpe.save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def llama_directory(tmp_path_factory: pytest.TempPathFactory, bpe: Any) -> Path:
    """Three heads share each key head."""
    sizes = SIZES | {"num_attention_heads": 6, "hidden_size": 96}
    directory = save(LlamaForCausalLM(LlamaConfig(**sizes)), tmp_path_factory.mktemp("llama"))
    bpe.save_pretrained(directory)
    return directory


@pytest.fixture(scope="session", params=["qwen3", "llama"])
def directory(request: pytest.FixtureRequest) -> Path:
    """Each of the two models."""
    found: Path = request.getfixturevalue(f"{request.param}_directory")
    return found
