"""The network that a run starts from, by its frozen config."""

from pathlib import Path

import torch
from transformers import PreTrainedModel

from llmtrain.config.adapter import QLoRAAdapter
from llmtrain.config.model import Qwen3Model
from llmtrain.config.root import TrainConfig
from llmtrain.models import directory
from llmtrain.models.build import build


def starting_network(config: TrainConfig, parent: Path | None) -> PreTrainedModel:
    """The parent's network, in 4 bits for QLoRA; one with fresh weights, from the global random generator, where there
    is no parent. Its adapter is put in afterwards (`adapter.attach`): what is measured before is the parent.

    A parent's network is in evaluation mode, so that nothing is dropped but what an adapter drops. Raises
    CheckpointMismatch where the parent does not load.
    """
    if parent is None:
        assert isinstance(config.model, Qwen3Model), "a published model is its own parent"
        return build(config.model)
    if isinstance(config.adapter, QLoRAAdapter):
        products = torch.bfloat16 if config.infra.precision == "bf16" else torch.float32
        return directory.load_in_4bit(parent, config.adapter, products)
    return directory.load(parent)
