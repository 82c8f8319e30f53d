"""llmtrain's side of the comparisons: its own network, steps and module, in Lightning's loop as a run has it."""

from collections.abc import Callable
from typing import Any

import lightning
import torch
from lightning.pytorch.plugins.environments import LightningEnvironment
from peers import Clock
from transformers import PreTrainedModel

from llmtrain.config.root import TrainConfig
from llmtrain.models import attention
from llmtrain.models.build import build
from llmtrain.training import device
from llmtrain.training.batches import Steps, steps_from
from llmtrain.training.module import TokenClock


def network_of(config: TrainConfig) -> PreTrainedModel:
    """The network with the weights that its seed gives, as transformers builds it: for both peers."""
    torch.manual_seed(config.trainer.seed)
    return build(config.model).to(config.infra.accelerator)


def prepared(config: TrainConfig) -> PreTrainedModel:
    """The same, with llmtrain's own settings and attention."""
    device.apply(config.infra)
    device.use_loss_kernel(config.infra)
    network = network_of(config)
    attention.use(network, device.attention_kernel(config.infra))
    return network


class _Observer(lightning.Callback):
    def __init__(self, clock: Clock, losses: list[float]) -> None:
        self.clock, self.losses = clock, losses

    def on_train_batch_end(self, trainer: Any, module: TokenClock, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.losses.append(module.figures["loss"])
        self.clock()


def fit(module: TokenClock, steps: Steps, config: TrainConfig) -> tuple[list[float], Clock]:
    """(the loss of each step, when each ended), trained as `llmtrain.training.run` does."""
    clock, losses = Clock(), list[float]()
    device.prepare(module.model, config.infra)
    trainer = lightning.Trainer(
        accelerator="gpu" if config.infra.accelerator == "cuda" else "cpu",
        devices=1,
        max_epochs=1,
        logger=False,
        callbacks=[_Observer(clock, losses)],
        plugins=[LightningEnvironment()],
        deterministic=config.infra.deterministic,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        limit_val_batches=0,
        use_distributed_sampler=False,
    )
    trainer.fit(module, steps_from(steps, 0))  # type: ignore[arg-type]
    return losses, clock


def observed(trainer_class: type, clock: Clock, losses: list[float], parts: int) -> type:
    """A transformers (or TRL) trainer that notes what `fit` does; a step has `parts` micro-batches."""
    from transformers import TrainerCallback

    class StepEnds(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
            clock()

    class Observed(trainer_class):  # type: ignore[misc]
        def __init__(self, **arguments: Any) -> None:
            super().__init__(**arguments)
            self.add_callback(StepEnds())
            self.parts: list[float] = []

        def _prepare_dataset(self, dataset: Any, *arguments: Any, **others: Any) -> Any:
            return dataset  # it is tokenised, and packed

        def training_step(self, *arguments: Any, **others: Any) -> torch.Tensor:
            loss: torch.Tensor = super().training_step(*arguments, **others)
            self.parts.append(loss.item())
            if len(self.parts) == parts:
                losses.append(sum(self.parts))
                self.parts.clear()
            return loss

    return Observed


def their_settings(config: TrainConfig, parts: int) -> dict[str, Any]:
    """`config` in transformers' terms: fp32, no recomputation, the same optimizer, fused; a step in `parts`."""
    trainer = config.trainer
    on_cpu = config.infra.accelerator == "cpu"
    return {
        "per_device_train_batch_size": trainer.batch_rows // parts,
        "gradient_accumulation_steps": parts,
        "num_train_epochs": 1,
        "train_sampling_strategy": "sequential",
        "learning_rate": trainer.lr,
        "lr_scheduler_type": "constant",
        "weight_decay": trainer.weight_decay,
        "adam_beta1": trainer.adam_beta1,
        "adam_beta2": trainer.adam_beta2,
        "adam_epsilon": trainer.adam_eps,
        "max_grad_norm": trainer.max_grad_norm,
        "optim": "adamw_torch_fused",
        "bf16": config.infra.precision == "bf16",
        "use_cpu": on_cpu,
        "dataloader_pin_memory": not on_cpu,
        "gradient_checkpointing": False,
        "logging_strategy": "no",
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
    }


Worker = Callable[[], None]
