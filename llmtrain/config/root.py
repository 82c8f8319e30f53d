"""The whole of `train.yaml`, and the rules that cross its groups."""

from typing import Annotated, Literal

from pydantic import model_validator

from llmtrain.config.adapter import Adapter
from llmtrain.config.base import Changes, Settings
from llmtrain.config.data import ChatData, Data, PreferenceData, TextData, VoteFile
from llmtrain.config.environment import Environment
from llmtrain.config.infra import Infra
from llmtrain.config.model import Model, Qwen3Model
from llmtrain.config.sweep import ASHASweep, Sweep
from llmtrain.config.tracking import Tracking
from llmtrain.config.trainer import DistillTrainer, DPOTrainer, PretrainTrainer, SFTTrainer, Trainer


class TrainConfig(Settings):
    """Everything that `train.py` needs to know."""

    schema_version: Annotated[Literal[5], Changes.SURFACE]
    """Version of this schema; frozen configs of older versions are migrated on load."""
    name: Annotated[str, Changes.SURFACE]
    """Experiment: the directory under `outputs_dir`, the tracker's experiment and the registered model's name."""
    outputs_dir: Annotated[str, Changes.SURFACE]
    """Where runs, prepared data, the tracker's database and the journal live; it may be moved as a whole."""
    model: Model
    adapter: Adapter
    trainer: Trainer
    data: Data
    infra: Infra
    environment: Environment
    tracking: Tracking
    sweep: Sweep

    @model_validator(mode="after")
    def groups_fit(self) -> "TrainConfig":
        match self.trainer, self.data:
            case ((PretrainTrainer() | DistillTrainer()), (PreferenceData() | ChatData())):
                raise ValueError(
                    f"trainer={self.trainer.kind} learns from text, but data.kind is {self.data.kind}; "
                    f"choose data=demo_pretrain, data=text_files or data=text_jsonl"
                )
            case SFTTrainer(), (TextData() | PreferenceData()):
                raise ValueError(
                    f"trainer=sft learns from chats, but data.kind is {self.data.kind}; "
                    f"choose data=demo_sft or data=chat_jsonl"
                )
            case DPOTrainer(), (TextData() | ChatData()):
                raise ValueError(
                    f"trainer=dpo learns from pairs, but data.kind is {self.data.kind}; "
                    f"choose data=demo_dpo or data=preference_jsonl"
                )
            case DPOTrainer() as trainer, PreferenceData(pairs=VoteFile()) if trainer.loss != "kto":
                raise ValueError(
                    f"trainer.loss={trainer.loss} compares two answers, but data.pairs.kind=votes judges single ones; "
                    f"set trainer.loss=kto, or choose data=preference_jsonl"
                )
        if self.infra.ranks > 1 and self.infra.strategy.startswith("deepspeed") and self.trainer.optimizer == "muon":
            raise ValueError(
                f"trainer.optimizer=muon needs whole matrices, which infra.strategy={self.infra.strategy} cuts up; "
                f"set trainer.optimizer=adamw, or infra.strategy=ddp"
            )
        _sweep_fits(self)
        if isinstance(self.model, Qwen3Model):  # a published model says it itself: training.resolve looks
            context_fits(self.trainer, self.model.max_position_embeddings)
        return self


def _sweep_fits(config: TrainConfig) -> None:
    """Raises ValueError where a sweep cannot measure what it is to stop by."""
    sweep, trainer = config.sweep, config.trainer
    if sweep.budget_usd is not None and config.infra.hardware.price_per_hour is None:
        raise ValueError(
            "sweep.budget_usd needs a price: set infra.hardware.price_per_hour, or sweep.budget_device_hours instead"
        )
    if isinstance(sweep, ASHASweep) and sweep.metric.startswith("validation/"):
        every = trainer.evaluate_every_tokens
        if sweep.rung_tokens < every:
            raise ValueError(
                f"sweep.rung_tokens={sweep.rung_tokens} comes before the first evaluation: set "
                f"trainer.evaluate_every_tokens={sweep.rung_tokens}, or sweep.rung_tokens={every} or more"
            )


def context_fits(trainer: Trainer, max_position_embeddings: int) -> None:
    """Raises ValueError where a sequence, or a sample's prompt, has no room in the model's context."""
    if trainer.sequence_tokens > max_position_embeddings:
        raise ValueError(
            f"trainer.sequence_tokens={trainer.sequence_tokens} is longer than "
            f"model.max_position_embeddings={max_position_embeddings}; lower the one or raise the other"
        )
    if trainer.sample_tokens >= max_position_embeddings:
        raise ValueError(
            f"trainer.sample_tokens={trainer.sample_tokens} leaves no room for a prompt in "
            f"model.max_position_embeddings={max_position_embeddings}; lower trainer.sample_tokens"
        )
