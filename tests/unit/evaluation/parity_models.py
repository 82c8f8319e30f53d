"""A tiny model that learnt a text, as training leaves it, and what can be wrong with one that is served."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import Qwen3Config, Qwen3ForCausalLM

from llmtrain.data.tokenizer import encode_texts, load_tokenizer, train_bpe
from llmtrain.models.directory import save

STEPS, STALE_STEPS = 240, 20
CONTEXT = 256
CONFIG = Qwen3Config(
    vocab_size=512, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=4, head_dim=16, max_position_embeddings=CONTEXT, tie_word_embeddings=True,
    rope_parameters={"rope_type": "default", "rope_theta": 10_000.0}, initializer_range=0.05,
)  # fmt: skip


def text() -> str:
    return "\n".join(topics[name] for name in sorted(topics))


def train(directory: Path) -> None:
    """`directory/model` after STEPS steps on the interpreter's own documentation, `directory/stale` some steps before;
    about 15 s."""
    train_bpe([text()], CONFIG.vocab_size, directory / "tokenizer")
    (ids,) = encode_texts(load_tokenizer(directory / "tokenizer"), [text()[:400_000]])
    stream = torch.tensor(ids[: len(ids) // 128 * 128]).view(-1, 128)
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(CONFIG)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - 0.9 * step / STEPS)
    for step in range(1, STEPS + 1):
        rows = stream[torch.randint(len(stream), (8,))]
        loss = model(input_ids=rows, labels=rows).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step == STEPS - STALE_STEPS:
            save(model, directory / "tokenizer", directory / "stale", "")
    save(model, directory / "tokenizer", directory / "model", "")


LAYER = "model.layers.1."
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
Weights = dict[str, torch.Tensor]


def wrong_theta(weights: Weights, config: dict[str, Any], stale: Weights) -> None:
    config["rope_parameters"]["rope_theta"] = 1_000_000.0  # Qwen3's own, where the run had another


def untied_head(weights: Weights, config: dict[str, Any], stale: Weights) -> None:
    config["tie_word_embeddings"] = False
    weights[HEAD] = stale[EMBEDDING].clone()


def swapped_q_k(weights: Weights, config: dict[str, Any], stale: Weights) -> None:
    q, k = (LAYER + f"self_attn.{name}_proj.weight" for name in "qk")
    weights[q], weights[k] = weights[k], weights[q]


def stale_weights(weights: Weights, config: dict[str, Any], stale: Weights) -> None:
    weights.update(stale)


def transposed_layer(weights: Weights, config: dict[str, Any], stale: Weights) -> None:
    name = LAYER + "self_attn.o_proj.weight"  # square
    weights[name] = weights[name].T.contiguous()


def zeroed_layer(weights: Weights, config: dict[str, Any], stale: Weights) -> None:
    name = LAYER + "mlp.down_proj.weight"
    weights[name] = torch.zeros_like(weights[name])


Fault = Callable[[Weights, dict[str, Any], Weights], None]
FAULTS: tuple[Fault, ...] = (
    wrong_theta, untied_head, swapped_q_k, stale_weights, transposed_layer, zeroed_layer,
)  # fmt: skip
"""Of weights and config; those of tokens and templates are the tests' own."""


def broken(trained: Path, fault: Fault, directory: Path) -> Path:
    """A copy of `trained/model` in `directory` with one fault."""
    shutil.copytree(trained / "model", directory)
    weights = load_file(directory / "model.safetensors")
    config = json.loads((directory / "config.json").read_text())
    fault(weights, config, load_file(trained / "stale" / "model.safetensors"))
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    (directory / "config.json").write_text(json.dumps(config))
    return directory
