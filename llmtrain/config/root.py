"""The whole of `train.yaml`, and the rules that cross its groups."""

from typing import Annotated, Literal

from pydantic import model_validator

from llmtrain.config.base import Changes, Settings
from llmtrain.config.data import Data, PreferenceData, TextData
from llmtrain.config.infra import Infra
from llmtrain.config.model import Model
from llmtrain.config.tracking import Tracking
from llmtrain.config.trainer import DPOTrainer, PretrainTrainer, Trainer


class TrainConfig(Settings):
    """Everything that `train.py` needs to know."""

    schema_version: Annotated[Literal[2], Changes.SURFACE]
    """Version of this schema; frozen configs of older versions are migrated on load."""
    name: Annotated[str, Changes.SURFACE]
    """Experiment: the directory under `outputs_dir`, the tracker's experiment and the registered model's name."""
    outputs_dir: Annotated[str, Changes.SURFACE]
    """Where runs, prepared data, the tracker's database and the journal live; it may be moved as a whole."""
    model: Model
    trainer: Trainer
    data: Data
    infra: Infra
    tracking: Tracking

    @model_validator(mode="after")
    def groups_fit(self) -> "TrainConfig":
        match self.trainer, self.data:
            case PretrainTrainer(), PreferenceData():
                raise ValueError(
                    "trainer=pretrain learns from text, but data.kind is preferences; "
                    "choose data=demo_pretrain, data=text_files or data=text_jsonl"
                )
            case DPOTrainer(), TextData():
                raise ValueError(
                    "trainer=dpo learns from pairs, but data.kind is text; "
                    "choose data=demo_dpo or data=preference_jsonl"
                )
        if self.trainer.sequence_tokens > self.model.max_position_embeddings:
            raise ValueError(
                f"trainer.sequence_tokens={self.trainer.sequence_tokens} is longer than "
                f"model.max_position_embeddings={self.model.max_position_embeddings}; lower the one or raise the other"
            )
        if self.trainer.sample_tokens >= self.model.max_position_embeddings:
            raise ValueError(
                f"trainer.sample_tokens={self.trainer.sample_tokens} leaves no room for a prompt in "
                f"model.max_position_embeddings={self.model.max_position_embeddings}; lower trainer.sample_tokens"
            )
        return self
