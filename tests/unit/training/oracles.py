"""What the comparisons with other code share: networks that are fp64 throughout, real steps, relative differences."""

import copy

import lightning
import torch
from lightning.pytorch.plugins.environments import LightningEnvironment
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import PreTrainedModel
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from llmtrain.training.batches import StepBatch, steps_from
from llmtrain.training.module import TokenClock

Gradients = dict[str, Tensor]


def in_fp64(network: PreTrainedModel) -> PreTrainedModel:
    """A copy that computes in fp64 throughout.

    Qwen3RMSNorm rounds what it is given to fp32; PyTorch's own RMSNorm, with the same weights, does not.
    """
    network = copy.deepcopy(network).double()
    for parent in list(network.modules()):
        for name, norm in list(parent.named_children()):
            if isinstance(norm, Qwen3RMSNorm):
                exact = nn.RMSNorm(len(norm.weight), eps=norm.variance_epsilon, dtype=torch.float64)
                exact.weight = norm.weight
                setattr(parent, name, exact)
    return network


class Recorder(lightning.Callback):
    """The loss of each step, its gradient norm before clipping, and the gradients that the optimizer was given."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.gradient_norms: list[float] = []
        self.gradients: list[Gradients] = []

    def on_train_start(self, trainer, module: TokenClock) -> None:
        update = module.ranks.update

        def recorded() -> None:
            self.gradients.append(gradients_of(module.model))
            update()

        module.ranks.update = recorded

    def on_train_batch_end(self, trainer, module: TokenClock, outputs, batch, batch_idx) -> None:
        self.losses.append(module.figures["loss"])
        self.gradient_norms.append(module.figures["grad_norm"])


def fit(module: TokenClock, steps: Dataset[StepBatch]) -> Recorder:
    """Train through Lightning, as a run does."""
    recorder = Recorder()
    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=1,
        logger=False,
        callbacks=[recorder],
        plugins=[LightningEnvironment()],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    trainer.fit(module, steps_from(steps, 0))
    return recorder


def whole_loss(module: TokenClock, step: StepBatch) -> float:
    """The loss of a step; its gradients are left in the network, as before clipping."""
    module.before_losses(step)
    total = 0.0
    for micro_batch in step.micro_batches:
        share = module.loss(micro_batch, step)
        share.backward()
        total += share.item()
    return total


def gradients_of(network: PreTrainedModel) -> Gradients:
    """A copy of each parameter's gradient, by its name."""
    return {name: parameter.grad.clone() for name, parameter in network.named_parameters()}


def largest_difference(ours: Gradients, theirs: Gradients) -> float:
    """The largest ||ours - theirs|| / ||theirs|| of any tensor."""
    assert ours.keys() == theirs.keys()
    return max(((ours[name] - theirs[name]).norm() / theirs[name].norm()).item() for name in ours)
