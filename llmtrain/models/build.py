"""From `model=` to a network, and the hash of its shape."""

from typing import Any

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from llmtrain.config.base import Changes, content_hash
from llmtrain.config.model import Qwen3Model

NOT_SHAPE = {"initializer_range", "attention_dropout"}
"""Fields that change training but not which weights fit."""


def hf_config(model: Qwen3Model) -> Qwen3Config:
    """The same network in Hugging Face's terms."""
    return Qwen3Config(
        vocab_size=model.vocab_size,
        hidden_size=model.hidden_size,
        intermediate_size=model.intermediate_size,
        num_hidden_layers=model.num_hidden_layers,
        num_attention_heads=model.num_attention_heads,
        num_key_value_heads=model.num_key_value_heads,
        head_dim=model.head_dim,
        max_position_embeddings=model.max_position_embeddings,
        rope_parameters={"rope_type": "default", "rope_theta": model.rope_theta},
        rms_norm_eps=model.rms_norm_eps,
        tie_word_embeddings=model.tie_word_embeddings,
        initializer_range=model.initializer_range,
        attention_dropout=model.attention_dropout,
        use_cache=False,
        attn_implementation="sdpa",
        dtype="float32",
    )


def build(model: Qwen3Model) -> Qwen3ForCausalLM:
    """A network with fresh fp32 weights, drawn from the global random generator."""
    return Qwen3ForCausalLM(hf_config(model))


def shape(model: Qwen3Model) -> dict[str, Any]:
    """The settings that decide which weights fit and what they compute."""
    fields = model.fields_that_change(Changes.MATHEMATICS)
    return {name: value for name, value in fields.items() if name not in NOT_SHAPE}


def shape_sha256(model: Qwen3Model) -> str:
    """Equal for two models that can exchange weights and then compute the same."""
    return content_hash(shape(model))


def parameter_counts(model: Qwen3Model) -> tuple[int, int]:
    """(all, without embeddings): tied weights once. Allocates nothing: the network stands on the meta device."""
    with torch.device("meta"):
        network = build(model)
    total = sum(parameter.numel() for parameter in network.parameters())
    embeddings = {id(layer.weight): layer.weight.numel() for layer in (network.model.embed_tokens, network.lm_head)}
    return total, total - sum(embeddings.values())
