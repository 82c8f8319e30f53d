"""The Lightning modules: one Lightning batch is one optimizer step, cut into micro-batches here.

Optimisation is manual, so that the loss is normalised over the global batch whatever the split, and so that evaluating
and saving (events.py) happen between two steps and nowhere else.
"""

import random
from abc import abstractmethod
from typing import Any

import lightning
import numpy as np
import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_
from transformers import PreTrainedModel

from llmtrain.config.infra import Infra
from llmtrain.config.trainer import DPOTrainer, PretrainTrainer
from llmtrain.errors import NonFiniteLoss
from llmtrain.models.logprobs import hidden_states, token_log_probs
from llmtrain.training.batches import PairRows, StepBatch, TextRows
from llmtrain.training.device import autocast
from llmtrain.training.evaluation import answer_log_probs
from llmtrain.training.losses import cross_entropy, dpo_sigmoid
from llmtrain.training.optim import adamw
from llmtrain.training.schedule import learning_rate


class TokenClock(lightning.LightningModule):
    """A model trained step by step; `tokens` trained on so far are its clock."""

    def __init__(
        self, model: PreTrainedModel, trainer: PretrainTrainer | DPOTrainer, infra: Infra, total_tokens: int
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.model, self.settings, self.infra, self.total_tokens = model, trainer, infra, total_tokens
        self.step = 0
        self.tokens = 0
        self.figures: dict[str, float] = {}  # of the step just done
        self._random_state: dict[str, Any] | None = None

    @abstractmethod
    def loss(self, rows: Any, num_units: int) -> Tensor:
        """A micro-batch's share of the step's loss: the shares of a step add up to its loss."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return adamw(self.model, self.settings)

    def on_train_batch_start(self, batch: StepBatch, batch_idx: int) -> None:
        if self._random_state is not None:  # not at load: what Lightning does in between may draw
            _restore_random_state(self._random_state)
            self._random_state = None

    def training_step(self, batch: StepBatch, batch_idx: int) -> None:
        optimizer = self.optimizers()
        assert not isinstance(optimizer, list)
        tokens = self.tokens + batch.num_tokens
        lr = learning_rate(
            tokens,
            peak=self.settings.lr,
            warmup_tokens=self.settings.warmup_tokens,
            total_tokens=self.total_tokens,
            min_share=self.settings.min_lr_share,
        )
        for group in optimizer.param_groups:
            group["lr"] = lr

        total = 0.0
        for rows in batch.micro_batches:
            with autocast(self.infra):
                loss = self.loss(rows, batch.num_units)
            self.manual_backward(loss)
            total += loss.item()
        grad_norm = clip_grad_norm_(self.model.parameters(), self.settings.max_grad_norm).item()

        if not (np.isfinite(total) and np.isfinite(grad_norm)):
            raise NonFiniteLoss(
                f"step {self.step + 1}, {tokens:,} tokens: loss {total}, gradient norm {grad_norm}, lr {lr:.1e}. "
                f"The weights before this step are intact. Lower trainer.lr (now {self.settings.lr:g}) or "
                f"trainer.max_grad_norm, raise trainer.warmup_tokens, or look at the data of this step"
            )
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        self.step += 1
        self.tokens = tokens
        self.figures = {"loss": total, "lr": lr, "grad_norm": grad_norm}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        del checkpoint["loops"]  # our own clock and a loader that begins at our step replace Lightning's counters
        checkpoint["global_step"] = self.step
        checkpoint["clock"] = {"step": self.step, "tokens": self.tokens}
        checkpoint["random_state"] = _random_state()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.step, self.tokens = checkpoint["clock"]["step"], checkpoint["clock"]["tokens"]
        self._random_state = checkpoint["random_state"]


class Pretraining(TokenClock):
    """Next-token cross-entropy."""

    def loss(self, rows: TextRows, num_units: int) -> Tensor:
        hidden = hidden_states(self.model, rows.ids[:, :-1]).flatten(0, 1)
        targets = rows.ids[:, 1:].flatten()
        log_probs = token_log_probs(hidden, self.model.get_output_embeddings(), targets, self.infra.loss_chunk_tokens)
        return cross_entropy(log_probs, num_units)


class DirectPreference(TokenClock):
    """DPO against a reference whose log-probabilities come with the batch.

    Dropout stays off: a loaded model is in evaluation mode, and training starts at its reference, loss ln 2.
    """

    settings: DPOTrainer

    def loss(self, rows: PairRows, num_units: int) -> Tensor:
        policy = answer_log_probs(self.model, rows, self.infra.loss_chunk_tokens)
        (chosen, rejected), (reference_chosen, reference_rejected) = policy.chunk(2), rows.reference.chunk(2)
        found = dpo_sigmoid(chosen, rejected, reference_chosen, reference_rejected, self.settings.beta)
        return found.losses.sum() / num_units


def _random_state() -> dict[str, Any]:
    """The state of every generator that training might draw from, in types that `torch.load` accepts unpickled."""
    numpy_state = np.random.get_state(legacy=False)["state"]
    state: dict[str, Any] = {
        "torch": torch.get_rng_state(),
        "python": list(random.getstate()[1]),
        "numpy": (torch.from_numpy(numpy_state["key"].astype(np.int64)), int(numpy_state["pos"])),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def _restore_random_state(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["torch"])
    random.setstate((3, tuple(state["python"]), None))
    key, position = state["numpy"]
    np.random.set_state(("MT19937", key.numpy().astype(np.uint32), position, 0, 0.0))
    if "cuda" in state:
        torch.cuda.set_rng_state_all(state["cuda"])
