"""How training makes what a plan traces: the same network, adapter, recomputation and optimizer."""

from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from llmtrain.artifacts import DatasetManifest
from llmtrain.config.adapter import NoAdapter
from llmtrain.config.infra import Infra
from llmtrain.config.model import HFModel, Qwen3Model, SmolLM2Model
from llmtrain.config.root import TrainConfig
from llmtrain.models.adapter import attach
from llmtrain.models.build import build
from llmtrain.plan.make import Planner
from llmtrain.plan.step import Recipe
from llmtrain.plan.workload import Row, Workload, estimated, row_of, sampled
from llmtrain.training import device
from llmtrain.training.batches import Steps
from llmtrain.training.optim import adamw, optimizer_of
from llmtrain.training.parents import obtain

SAMPLED_STEPS = 16


def planner(
    config: TrainConfig,
    outputs: Path,
    baseline_bytes: int,
    steps: Steps | None = None,
    manifest: DatasetManifest | None = None,
) -> Planner:
    """The planner of a config; with the run's `steps`, of what they really hold; else by the counts of the data that it
    learns from, where `manifest` has them: without, nobody knows how long tuning takes.

    `baseline_bytes` is what the process had before the network was made: `llmtrain.plan.machine.resident_bytes`.
    """
    config = config.model_copy(update={"infra": resolved(config.infra)})
    workload = estimated(config, manifest) if steps is None else workload_of(steps, config.infra)
    return Planner(config, lambda one: recipe_of(one, outputs), workload, outputs, baseline_bytes)


def resolved(infra: Infra) -> Infra:
    """`infra` with the precision that it will have where it runs, which need not be here."""
    if infra.accelerator == "cuda":
        precision = "bf16" if infra.precision == "bf16_if_fast" else infra.precision
        return infra.model_copy(update={"precision": precision})
    return device.resolve(infra)


def workload_of(steps: Steps, infra: Infra) -> Workload:
    """The workload of the run, from steps spread over it."""
    numbers = sorted({number * len(steps) // SAMPLED_STEPS for number in range(SAMPLED_STEPS)})
    found: list[list[Row]] = []
    for number in numbers:
        found.append([row_of(micro_batch.packed) for micro_batch in steps[number].micro_batches])
    tokens = sum(row.num_tokens for step in found for row in step) / len(found) * len(steps)
    return sampled(found, len(steps), round(tokens), infra.ranks)


def recipe_of(config: TrainConfig, outputs: Path) -> Recipe:
    """What training makes of `config`, compiled kernels excepted: they are planned as if they were not."""
    plain = config.infra.model_copy(update={"compile": False})

    def adapted(model: PreTrainedModel) -> PreTrainedModel:
        return model if isinstance(config.adapter, NoAdapter) else attach(model, config.adapter)

    def optimizer(model: PreTrainedModel) -> torch.optim.Optimizer:
        if config.trainer.optimizer == "adamw_8bit":  # its kernels know no tensors without data
            return adamw(model, config.trainer)
        return optimizer_of(model, config.trainer, plain.accelerator)

    published: Any = None if isinstance(config.model, Qwen3Model) else _published(config.model, outputs)

    def network(layers: int | None) -> PreTrainedModel:
        """Fresh networks in training mode, others in evaluation mode."""
        if isinstance(config.model, Qwen3Model):
            model = config.model if layers is None else config.model.model_copy(update={"num_hidden_layers": layers})
            return build(model).train(config.trainer.kind in ("pretrain", "distill"))
        shallow = deepcopy(published)
        if layers is not None:
            shallow.num_hidden_layers = layers
            if getattr(shallow, "layer_types", None):
                shallow.layer_types = shallow.layer_types[:layers]
        found: PreTrainedModel = AutoModelForCausalLM.from_config(shallow, dtype=torch.float32)
        return found.eval()

    shape: Any = published or config.model
    return Recipe(network, shape.num_hidden_layers, adapted, lambda model: device.prepare(model, plain), optimizer)


def _published(model: HFModel | SmolLM2Model, outputs: Path) -> Any:
    """The config.json of a published model; of the hub, nothing else is fetched."""
    match model:
        case HFModel():
            found = AutoConfig.from_pretrained(model.path, revision=model.revision, trust_remote_code=False)
        case SmolLM2Model():
            found = AutoConfig.from_pretrained(obtain(model, outputs, lambda line: None).directory)
    return found.get_text_config()
