"""The Lightning modules: one Lightning batch is one optimizer step, cut into micro-batches here.

Optimisation is manual, so that the loss is normalised over the global batch whatever the split, and so that evaluating
and saving (events.py) happen between two steps and nowhere else.
"""

import hashlib
import random
from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import lightning
import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from llmtrain.config.infra import Infra
from llmtrain.config.trainer import DistillTrainer, DPOTrainer, Trainer
from llmtrain.errors import NonFiniteLoss
from llmtrain.models.adapter import is_attached, trainable_state
from llmtrain.models.head import chunks_of, loss_of_logits, loss_of_sums, loss_of_tokens
from llmtrain.models.logprobs import hidden_states
from llmtrain.training.batches import AnswerLogProbs, MicroBatch, StepBatch
from llmtrain.training.device import autocast
from llmtrain.training.divergences import divergence
from llmtrain.training.evaluation import answer_sums
from llmtrain.training.optim import optimizer_of
from llmtrain.training.origin import Sickness, find_origin
from llmtrain.training.preference_losses import Answers, StepFacts, kl_baseline, kto_loss, preference_loss
from llmtrain.training.ranks.alone import Alone
from llmtrain.training.schedule import learning_rate
from llmtrain.training.teacher_store import TeacherRows


class TokenClock(lightning.LightningModule):
    """A model trained step by step; `tokens` trained on so far are its clock."""

    def __init__(self, model: PreTrainedModel, trainer: Trainer, infra: Infra, total_tokens: int) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.strict_loading = not is_attached(model)  # of a network with an adapter, checkpoints hold the adapter alone
        self.model, self.settings, self.infra, self.total_tokens = model, trainer, infra, total_tokens
        self.ranks = Alone()
        self.ranks.shard(model)
        self.step = 0
        self.tokens = 0
        self.order_sha256 = ""
        """Chain of hashes over the indices of each step's sequences: equal for equal data in an equal order."""
        self.figures: dict[str, float] = {}  # of the step just done
        self.before_update: Callable[[], None] = lambda: None
        self.sickness: Sickness | None = None
        self._random_state: dict[str, Any] | None = None

    @abstractmethod
    def loss(self, micro_batch: MicroBatch, step: StepBatch) -> Tensor:
        """A micro-batch's share of the step's loss: the shares of a step add up to its loss."""

    def before_losses(self, step: StepBatch) -> None:
        """What `loss` needs to know of the whole step; without gradients."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        optimizer = optimizer_of(self.model, self.settings, self.infra.accelerator)
        return self.ranks.prepare(optimizer, self.settings.max_grad_norm)

    def on_train_start(self) -> None:
        self.ranks.restore()

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
            schedule=self.settings.schedule,
            decay_share=self.settings.decay_share,
        )
        for group in optimizer.param_groups:
            group["lr"] = lr

        self.before_losses(batch)
        total = torch.zeros((), device=self.device)
        for left, micro_batch in self.own(batch):

            def share(micro_batch: MicroBatch = micro_batch) -> Tensor:
                with autocast(self.infra):
                    return self.loss(micro_batch, batch)

            total = total + self.ranks.backward(share, last=not left)
        norm = self.ranks.clip()
        loss_value, grad_norm = self.ranks.total(total).item(), norm.item()

        if not (np.isfinite(loss_value) and np.isfinite(grad_norm)):
            self.sickness = self._sickness(batch, tokens, loss_value, grad_norm, lr)
            raise NonFiniteLoss(
                f"step {self.step + 1}, {tokens:,} tokens: loss {loss_value}, gradient norm {grad_norm}, lr {lr:.1e}; "
                f"{self.sickness.told()}. "
                f"The weights before this step are intact. Lower trainer.lr (now {self.settings.lr:g}) or "
                f"trainer.max_grad_norm, raise trainer.warmup_tokens, or look at the data of this step: "
                f"`llmtrain doctor` with the run's directory shows them"
            )
        self.before_update()
        self.ranks.update()
        self.step += 1
        self.tokens = tokens
        self.order_sha256 = _chained(self.order_sha256, batch)
        self.figures = {"loss": loss_value, "lr": lr, "grad_norm": grad_norm}

    def _sickness(self, batch: StepBatch, tokens: int, loss: float, grad_norm: float, lr: float) -> Sickness:
        """Where it comes from that the loss, or the gradient, of this step is not finite."""

        def share(micro_batch: MicroBatch) -> Tensor:
            with autocast(self.infra):
                return self.loss(micro_batch, batch)

        origin = None
        if not self.ranks.splits_weights:
            own = [micro_batch for _, micro_batch in self.own(batch)]
            origins = self.ranks.gathered(find_origin(self.model, own, share, backward=self.ranks.size == 1))
            origin = next((found for found in origins if found), None)
        return Sickness(step=self.step + 1, tokens=tokens, loss=loss, grad_norm=grad_norm, lr=lr, origin=origin)

    def own(self, batch: StepBatch) -> list[tuple[int, MicroBatch]]:
        """This rank's micro-batches, each with the number of those that follow."""
        own = batch.micro_batches[self.ranks.data_rank :: self.ranks.data_ranks]
        return [(len(own) - number, micro_batch) for number, micro_batch in enumerate(own, 1)]

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        del checkpoint["loops"]  # our own clock and a loader that begins at our step replace Lightning's counters
        checkpoint["global_step"] = self.step
        checkpoint["state_dict"] = trainable_state(self, checkpoint["state_dict"])
        checkpoint["clock"] = {"step": self.step, "tokens": self.tokens, "order_sha256": self.order_sha256}
        checkpoint["random_state"], *others = self.ranks.gathered(_random_state())
        if others:
            checkpoint["random_states_of_other_ranks"] = others

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.step, self.tokens = checkpoint["clock"]["step"], checkpoint["clock"]["tokens"]
        self.order_sha256 = checkpoint["clock"].get("order_sha256", "")
        states = [checkpoint["random_state"], *checkpoint.get("random_states_of_other_ranks", [])]
        if self.ranks.rank < len(states):  # a rank that there was not before keeps the generators it was seeded with
            self._random_state = states[self.ranks.rank]


class CrossEntropy(TokenClock):
    """Cross-entropy of the targets: next tokens of text (pretraining), the assistant's tokens of chats (SFT).

    Fine-tuning does without dropout: a loaded model is in evaluation mode, and stays so.
    """

    def loss(self, micro_batch: MicroBatch, step: StepBatch) -> Tensor:
        packed = micro_batch.packed
        hidden, weight = hidden_states(self.model, packed), self.model.get_output_embeddings().weight
        return loss_of_tokens(hidden, weight, packed.targets, 1 / step.num_units, self.infra.loss_chunk_tokens)


class Distillation(TokenClock):
    """The divergence from a teacher and the cross-entropy of the text, `ce_weight` of the latter, mean over targets."""

    settings: DistillTrainer

    def __init__(
        self, model: PreTrainedModel, trainer: DistillTrainer, infra: Infra, total_tokens: int, teacher: TeacherRows
    ) -> None:
        super().__init__(model, trainer, infra, total_tokens)
        self.teacher = teacher

    def loss(self, micro_batch: MicroBatch, step: StepBatch) -> Tensor:
        packed, settings = micro_batch.packed, self.settings
        known = self.teacher.of(micro_batch.indices.tolist(), packed.ids.device)

        def of_logits(logits: Tensor, where: slice) -> Tensor:
            spread = divergence(logits, known[where], settings.temperature, settings.divergence)
            losses = cross_entropy(logits, packed.targets[where], reduction="none")
            return torch.lerp(spread, losses, settings.ce_weight).sum() / step.num_units

        hidden, weight = hidden_states(self.model, packed), self.model.get_output_embeddings().weight
        return loss_of_logits(hidden, weight, of_logits, self.infra.loss_chunk_tokens)


class DirectPreference(TokenClock):
    """DPO and its family, against a reference whose log-probabilities come with the batch.

    Dropout stays off: a loaded model is in evaluation mode, and training starts at its reference, loss ln 2.
    """

    settings: DPOTrainer

    def loss(self, micro_batch: MicroBatch, step: StepBatch) -> Tensor:
        packed = micro_batch.packed
        counts = torch.tensor(packed.counts, device=packed.ids.device)
        facts = StepFacts(mean_chosen_tokens=step.num_chosen_tokens / step.num_units, kl_baseline=None)

        def of_sums(sums: Tensor, owners: slice) -> Tensor:
            policy = Answers(sums[0::2], sums[1::2], counts[owners][0::2], counts[owners][1::2])
            reference = micro_batch.reference[owners]
            found = preference_loss(self.settings, policy, AnswerLogProbs(reference[0::2], reference[1::2]), facts)
            return found.losses.sum() / step.num_units

        chunk_tokens, weight = self.infra.loss_chunk_tokens, self.model.get_output_embeddings().weight
        chunks = chunks_of(packed.counts, 2, chunk_tokens)
        hidden = hidden_states(self.model, packed)
        return loss_of_sums(hidden, weight, packed.targets, packed.owners, chunks, of_sums, chunk_tokens)


class Votes(TokenClock):
    """KTO: single answers, desirable or not, against the step's KL baseline."""

    settings: DPOTrainer

    @torch.no_grad()
    def before_losses(self, step: StepBatch) -> None:
        """The baseline, from answers to other prompts under the policy as this step finds it."""
        policy, reference = [], []
        for _, micro_batch in self.own(step):
            assert micro_batch.mismatched is not None
            assert micro_batch.mismatched_reference is not None
            with autocast(self.infra):
                policy.append(
                    self.ranks.compute(answer_sums, self.model, micro_batch.mismatched, self.infra.loss_chunk_tokens)
                )
            reference.append(micro_batch.mismatched_reference)
        parts = self.ranks.gathered_shares(torch.stack([torch.cat(policy), torch.cat(reference)]))
        self.kl_baseline = kl_baseline(*torch.cat(parts, dim=1))

    def loss(self, micro_batch: MicroBatch, step: StepBatch) -> Tensor:
        packed, settings = micro_batch.packed, self.settings
        weights = settings.desirable_weight, settings.undesirable_weight

        def of_sums(sums: Tensor, owners: slice) -> Tensor:
            ratios, desirable = sums - micro_batch.reference[owners], micro_batch.is_desirable[owners]
            return kto_loss(ratios, desirable, self.kl_baseline, settings.beta, *weights).sum() / step.num_units

        chunk_tokens, weight = self.infra.loss_chunk_tokens, self.model.get_output_embeddings().weight
        chunks = chunks_of(packed.counts, 1, chunk_tokens)
        hidden = hidden_states(self.model, packed)
        return loss_of_sums(hidden, weight, packed.targets, packed.owners, chunks, of_sums, chunk_tokens)


def _chained(before: str, batch: StepBatch) -> str:
    """The hash of `before` and of which sequences `batch` has, however they lie in micro-batches."""
    indices = sorted(index for micro_batch in batch.micro_batches for index in micro_batch.indices.tolist())
    return hashlib.sha256(f"{before} {indices}".encode()).hexdigest()


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
