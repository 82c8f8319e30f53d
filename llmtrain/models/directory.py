"""A model as a Hugging Face directory: safetensors, tokenizer, generation config, card; whole or not there at all."""

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from llmtrain.errors import CheckpointMismatch, IntegrityError
from llmtrain.files import whole_directory

transformers_logging.disable_progress_bar()


def save(model: PreTrainedModel, tokenizer_directory: Path, directory: Path, card: str) -> None:
    """Write `model` with its tokenizer to `directory`, which `from_pretrained` then loads.

    The directory is written aside, loaded back, compared with the live weights tensor for tensor and on the logits of
    one row, fsynced, and only then renamed. Raises IntegrityError where what was read back differs.
    """
    with whole_directory(directory) as aside:
        model.save_pretrained(aside)
        tokenizer = AutoTokenizer.from_pretrained(tokenizer_directory)
        tokenizer.save_pretrained(aside)
        GenerationConfig(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id).save_pretrained(
            aside
        )
        (aside / "README.md").write_text(card)
        _compare(model, aside)


def load(directory: Path) -> PreTrainedModel:
    """The model of a directory, fp32, in evaluation mode. Raises CheckpointMismatch where there is none."""
    try:
        return AutoModelForCausalLM.from_pretrained(
            directory, dtype=torch.float32, attn_implementation="sdpa", local_files_only=True
        )
    except (OSError, ValueError) as error:
        raise CheckpointMismatch(f"{directory} holds no model that loads: {error}") from error


@torch.no_grad()
def _compare(model: PreTrainedModel, directory: Path) -> None:
    """Raises IntegrityError unless the model in `directory` equals the live one."""
    written = load(directory).to(model.device)
    live, read = model.state_dict(), written.state_dict()
    different = sorted(name for name in live.keys() | read.keys() if name not in live or name not in read
                       or not torch.equal(live[name], read[name]))  # fmt: skip
    if different:
        raise IntegrityError(f"{directory}: read back, these tensors differ from the live ones: {different[:5]}")
    training = model.training
    model.eval()
    ids = (torch.arange(32, device=model.device) * 7919 % model.config.vocab_size)[None]
    equal = torch.equal(model(input_ids=ids).logits, written(input_ids=ids).logits)
    model.train(training)
    if not equal:
        raise IntegrityError(f"{directory}: equal weights, different logits: the config was not written as it is")
