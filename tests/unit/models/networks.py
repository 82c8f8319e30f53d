"""Tiny networks, and rows of random trees, for the tests of packed rows."""

import numpy as np
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from llmtrain.models.packed import Answer, Tree

VOCABULARY = 97
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
}


def qwen3(**changes) -> Qwen3ForCausalLM:
    torch.manual_seed(0)
    return Qwen3ForCausalLM(Qwen3Config(**SIZES | changes))


def random_tree(random: np.random.Generator, prompt: int, *answers: int) -> Tree:
    """A prompt and answers of these lengths; about two of three answers' tokens are targets."""

    def ids(length: int) -> np.ndarray:
        return random.integers(VOCABULARY, size=length)

    return Tree(ids(prompt), [Answer(ids(length), random.random(length) < 0.7) for length in answers])


SHAPES = [(0, 9), (4, 3, 5), (0, 6), (1, 1, 2), (4, 3, 5), (7, 6), (0, 1), (3, 1, 1, 4), (0, 9)]
"""Prompt and answers of each tree of `some_trees`: documents, pairs, an answer of one token, three answers, equals."""


def some_trees() -> list[Tree]:
    random = np.random.default_rng(0)
    return [random_tree(random, *shape) for shape in SHAPES]
