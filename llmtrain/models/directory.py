"""A model as a Hugging Face directory: safetensors, tokenizer, generation config, card; whole or not there at all."""

from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    GenerationConfig,
    PreTrainedModel,
)
from transformers.utils import logging as transformers_logging

from llmtrain.config.adapter import QLoRAAdapter
from llmtrain.errors import CheckpointMismatch, IntegrityError
from llmtrain.files import whole_directory
from llmtrain.models.modes import evaluating

transformers_logging.disable_progress_bar()


def save(model: PreTrainedModel, tokenizer_directory: Path, directory: Path, card: str) -> None:
    """Write `model` with its tokenizer to `directory`, which `from_pretrained` then loads.

    The directory is written aside, loaded back, compared with the live weights tensor for tensor and on the logits of
    one row, fsynced, and only then renamed. Raises IntegrityError where what was read back differs.
    """
    with whole_directory(directory) as aside:
        tokenizer = AutoTokenizer.from_pretrained(tokenizer_directory)
        generation = _generation_config(model, tokenizer)
        model.save_pretrained(aside)
        tokenizer.save_pretrained(aside)
        generation.save_pretrained(aside)
        (aside / "README.md").write_text(card)
        _compare(model, aside)


def load(directory: Path) -> PreTrainedModel:
    """The model of a directory, fp32, in evaluation mode: safetensors only, and no code that lies there is run.

    Raises CheckpointMismatch where there is none that loads whole.
    """
    return _load(directory)


def load_in_4bit(directory: Path, adapter: QLoRAAdapter, compute_dtype: torch.dtype) -> PreTrainedModel:
    """The same with its linear layers, all but the output, in 4 bits; products are computed in `compute_dtype`."""
    return _load(
        directory,
        quantization_config=BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=adapter.quantization,
            bnb_4bit_use_double_quant=adapter.double_quantization,
            bnb_4bit_compute_dtype=compute_dtype,
        ),
    )


def stop_ids(tokenizer: Any) -> list[int]:
    """The tokens after which generation ends: end of text and, where a chat template has one, the end of a turn."""
    ids = {tokenizer.eos_token_id}
    if tokenizer.chat_template:
        turns = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]
        end = str(tokenizer.apply_chat_template(turns, tokenize=False)).rpartition("A")[2].strip()
        found = tokenizer.convert_tokens_to_ids(end)
        ids |= {found} if end in tokenizer.get_vocab() else set()
    return sorted(ids)


def _load(directory: Path, **options: Any) -> PreTrainedModel:
    try:
        model, found = AutoModelForCausalLM.from_pretrained(
            directory,
            dtype=torch.float32,
            attn_implementation="sdpa",
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
            **options,
        )
    except (OSError, ValueError) as error:
        raise CheckpointMismatch(f"{directory} holds no model that loads: {error}") from error
    if found["missing_keys"]:
        missing = sorted(found["missing_keys"])
        raise CheckpointMismatch(
            f"{directory} lacks {len(missing)} of the tensors of a {type(model).__name__} ({missing[0]}, ...); "
            f"restore its files, or choose a model that has all of them"
        )
    return model


def _generation_config(model: PreTrainedModel, tokenizer: Any) -> GenerationConfig:
    """Where generation ends: what the parent said, and the tokenizer says."""
    given = model.generation_config.eos_token_id if model.generation_config else None
    before = given if isinstance(given, list) else [] if given is None else [given]
    ends = sorted({*before, *stop_ids(tokenizer)})
    return GenerationConfig(eos_token_id=ends if len(ends) > 1 else ends[0], pad_token_id=tokenizer.pad_token_id)


@torch.no_grad()
def _compare(model: PreTrainedModel, directory: Path) -> None:
    """Raises IntegrityError unless the model in `directory` equals the live one."""
    written = load(directory).to(model.device)
    live, read = model.state_dict(), written.state_dict()
    different = sorted(name for name in live.keys() | read.keys() if name not in live or name not in read
                       or not torch.equal(live[name], read[name]))  # fmt: skip
    if different:
        raise IntegrityError(f"{directory}: read back, these tensors differ from the live ones: {different[:5]}")
    ids = (torch.arange(32, device=model.device) * 7919 % model.config.vocab_size)[None]
    with evaluating(model), evaluating(written):
        equal = torch.equal(model(input_ids=ids).logits, written(input_ids=ids).logits)
    if not equal:
        raise IntegrityError(f"{directory}: equal weights, different logits: the config was not written as it is")
