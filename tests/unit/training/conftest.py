"""A tiny network, a stream of tokens, and a handful of pairs, votes and chats, written by the real writers."""

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from llmtrain.config.compose import load_config
from llmtrain.config.root import TrainConfig
from llmtrain.data.chats import Chat, ChatRows, ChatText, ChatWriter
from llmtrain.data.preferences import Pair, PairText, PairWriter, PreferencePairs
from llmtrain.data.text import ShardWriter, TokenShards
from llmtrain.models.build import build

VOCABULARY = 512


@pytest.fixture
def pretrain_config() -> TrainConfig:
    return load_config(
        [
            "model=qwen3_tiny",
            "infra.precision=fp32",
            "trainer.sequence_tokens=16",
            "trainer.batch_rows=6",
            "trainer.budget_tokens=1_000",
            "trainer.warmup_tokens=100",
        ]
    )


@pytest.fixture
def dpo_config() -> TrainConfig:
    return load_config(["model=qwen3_tiny", "trainer=dpo", "infra.precision=fp32", "trainer.batch_rows=4"])


@pytest.fixture
def sft_config() -> TrainConfig:
    shape = ["trainer.sequence_tokens=32", "trainer.batch_rows=3"]
    return load_config(["model=qwen3_tiny", "trainer=sft", "infra.precision=fp32", *shape])


@pytest.fixture
def kto_config() -> TrainConfig:
    return load_config(["model=qwen3_tiny", "trainer=kto", "infra.precision=fp32", "trainer.batch_rows=4"])


@pytest.fixture
def network(pretrain_config: TrainConfig) -> PreTrainedModel:
    torch.manual_seed(0)
    return build(pretrain_config.model)


@pytest.fixture
def shards(tmp_path: Path) -> TokenShards:
    writer = ShardWriter(tmp_path, "train", np.dtype("<u2"), shard_tokens=100)
    random = np.random.default_rng(0)
    for length in (40, 1, 130, 77):
        writer.append(random.integers(VOCABULARY, size=length), num_bytes=3 * length)
    writer.close()
    return TokenShards(tmp_path, "train")


@pytest.fixture
def pairs(tmp_path: Path) -> PreferencePairs:
    """10 pairs of prompts, chosen and rejected answers of unequal lengths."""
    random = np.random.default_rng(1)
    writer = PairWriter(tmp_path, "train", np.dtype("<u2"))
    for number in range(10):
        prompt, chosen, rejected = (random.integers(VOCABULARY, size=size) for size in random.integers(2, 20, size=3))
        writer.append(Pair(prompt, chosen, rejected), PairText(f"prompt {number}", "chosen", "rejected", "here"))
    writer.close()
    return PreferencePairs(tmp_path, "train")


@pytest.fixture
def votes(tmp_path: Path) -> PreferencePairs:
    """10 votes on answers of unequal lengths, each with an answer to another prompt; every third is undesirable."""
    random = np.random.default_rng(2)
    writer = PairWriter(tmp_path, "votes", np.dtype("<u2"))
    for number in range(10):
        prompt, answer, other = (random.integers(VOCABULARY, size=size) for size in random.integers(2, 20, size=3))
        text = PairText(f"prompt {number}", "answer", "of another", "here")
        writer.append(Pair(prompt, answer, other), text, is_desirable=number % 3 != 0)
    writer.close()
    return PreferencePairs(tmp_path, "votes")


@pytest.fixture
def chats(tmp_path: Path) -> ChatRows:
    """13 chats of 2 to 30 tokens, of which about half are targets, at least one in each chat."""
    random = np.random.default_rng(3)
    writer = ChatWriter(tmp_path, "train", np.dtype("<u2"))
    for number, length in enumerate(random.integers(2, 30, size=13)):
        is_target = random.random(length) < 0.5
        is_target[0], is_target[-1] = False, True
        writer.append(Chat(random.integers(VOCABULARY, size=length), is_target), ChatText(f"chat {number}", "here"))
    writer.close()
    return ChatRows(tmp_path, "train")
