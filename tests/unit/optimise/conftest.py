"""Tiny networks with random weights and a byte-level tokenizer, exported once for all tests here."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from llmtrain.config.compose import Composer
from llmtrain.config.optimise import Optimise
from llmtrain.config.serve import OptimiseConfig

SIZES = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "bos_token_id": None,
}


def settings(option: str, *overrides: str) -> Optimise:
    """`optimise=option` with little to measure."""
    few = [
        "documents=6",
        "block_size=32",
        "document_tokens=64",
        "prompt_tokens=16",
        "new_tokens=4",
        "rounds=1",
        "batch_sizes=[1,2]",
    ]
    words = [f"optimise={option}", "run=STAND_IN", *(f"optimise.{word}" for word in [*few, *overrides])]
    return Composer((), "optimisation", root=OptimiseConfig).check(words).good().optimise


def save(model: PreTrainedModel, directory: Path) -> Path:
    """With weights that are far from zero, so that a swapped or forgotten one is seen."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.data.uniform_(0.5, 1.5, generator=generator)
        else:
            parameter.data.normal_(0, 0.08, generator=generator)
    model.save_pretrained(directory)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *alphabet]
    tokenizer = Tokenizer(models.BPE(vocab={word: number for number, word in enumerate(words)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    fast.chat_template = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    fast.save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Directory of a model by name: `tied` and `untied` are Qwen3 with wide heads, `llama` has three heads a group."""
    made: dict[str, Path] = {}

    def source(name: str) -> Path:
        if name not in made:
            match name:
                case "llama":
                    sizes = SIZES | {"hidden_size": 96, "num_attention_heads": 6, "tie_word_embeddings": True}
                    model: PreTrainedModel = LlamaForCausalLM(LlamaConfig(**sizes))
                case _:
                    model = Qwen3ForCausalLM(Qwen3Config(**SIZES, head_dim=32, tie_word_embeddings=name == "tied"))
            made[name] = save(model, tmp_path_factory.mktemp(name))
        return made[name]

    return source
