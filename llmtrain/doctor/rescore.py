"""What the loss of a step came from: its documents, chats or pairs, each judged alone by a checkpoint's weights."""

from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel

from llmtrain.config.adapter import NoAdapter
from llmtrain.config.frozen import FrozenRun
from llmtrain.config.infra import Infra
from llmtrain.config.trainer import DPOTrainer
from llmtrain.data.preferences import PreferencePairs
from llmtrain.doctor.opened import OpenedRun
from llmtrain.doctor.rows import AnySteps, Member, Names, spans_of
from llmtrain.errors import IntegrityError
from llmtrain.models import attention
from llmtrain.models.adapter import attach, is_attached
from llmtrain.models.packed import pack
from llmtrain.models.start import starting_network
from llmtrain.training import checkpoints, device
from llmtrain.training.batches import AnswerLogProbs, ChatSteps, PairSteps, TextSteps
from llmtrain.training.evaluation import evaluating, score_pairs, target_log_probs
from llmtrain.training.preference_losses import Answers, StepFacts, kl_baseline, kto_loss, preference_loss
from llmtrain.training.resolve import Inputs

MODULE_PREFIX = "model."
"""Of the network's parameters in a checkpoint."""


@dataclass(frozen=True)
class Scored:
    """A member of a step with its own loss."""

    member: Member
    loss: float
    """Nats per target of a document or chat; of a pair or vote, its loss."""
    count: int
    """Targets in the step; 1 of a pair."""


class Judge:
    """Weights of a run, to judge single steps by."""

    def __init__(self, run: OpenedRun, inputs: Inputs) -> None:
        self.run, self.infra = run, here(run.frozen.config.infra)
        config = run.frozen.config
        self.start = inputs.parent.directory if inputs.parent else None
        self.config = config.model_copy(update={"infra": self.infra})
        self.model: PreTrainedModel = starting_network(self.config, self.start)
        self.model.to(self.infra.accelerator)
        attention.use(self.model, device.attention_kernel(self.infra))

    def scored(self, names: Names, indices: list[int], step: int) -> tuple[list[Scored], Path | None]:
        """The members of these rows by their own loss, the largest first, and the checkpoint that judged them.

        It is the newest of fewer steps than `step`, or the oldest of all; none, and nobody, where none is left that one
        process can read. To be called once.
        """
        reference = None
        if isinstance(names.steps, PairSteps):  # what the network says before training
            reference = score_pairs(self.model, names.steps.pairs, indices, self.infra)
        checkpoint = self._load(step)
        if checkpoint is None:
            return [], None
        if reference is not None:
            return self._pairs(names, indices, reference), checkpoint
        return self._text(names, indices), checkpoint

    def _load(self, step: int) -> Path | None:
        wanted = _nearest(self.run.directory / "checkpoints", step)
        if wanted is None:
            return None
        state = checkpoints.AtomicCheckpoints().load_checkpoint(wanted)["state_dict"]
        if not state:  # DeepSpeed's own form
            return None
        if not isinstance(self.config.adapter, NoAdapter):
            attach(self.model, self.config.adapter)
        weights = {name.removeprefix(MODULE_PREFIX): tensor for name, tensor in state.items()}
        self.model.load_state_dict(weights, strict=not is_attached(self.model))  # or the adapter alone
        return wanted

    @torch.no_grad()
    def _text(self, names: Names, indices: list[int]) -> list[Scored]:
        """The documents, or chats, of these rows, by loss per target, the largest first."""
        totals: dict[int, list[float]] = {}
        with evaluating(self.model, self.infra):
            for index in indices:
                packed = pack(names.trees(index)).to(self.model.device)
                losses = (-target_log_probs(self.model, packed, self.infra.loss_chunk_tokens)).tolist()
                for owner, loss in zip(_owners(names, index, packed.owners.tolist()), losses, strict=True):
                    totals.setdefault(owner, []).append(loss)
        member = names.document if isinstance(names.steps, TextSteps) else names.chat
        found = [Scored(member(number), sum(own) / len(own), len(own)) for number, own in totals.items()]
        return sorted(found, key=lambda scored: -scored.loss)

    def _pairs(self, names: Names, indices: list[int], reference: AnswerLogProbs) -> list[Scored]:
        """These pairs, or votes, by their own loss, the largest first."""
        assert isinstance(names.steps, PairSteps)
        pairs, trainer = names.steps.pairs, names.steps.trainer
        policy = score_pairs(self.model, pairs, indices, self.infra)
        losses = _losses(trainer, policy, reference, pairs, indices)
        found = [Scored(names.pair(index), loss, 1) for index, loss in zip(indices, losses, strict=True)]
        return sorted(found, key=lambda scored: -scored.loss)


def here(infra: Infra) -> Infra:
    """`infra` for one process of this machine, without compilation."""
    changes: dict[str, object] = {"ranks": 1, "compile": False, "activation_checkpointing": "none", "attention": "auto"}
    if infra.accelerator == "cuda" and not torch.cuda.is_available():
        changes |= {"accelerator": "cpu", "precision": "fp32"}
    return infra.model_copy(update=changes)


def can_be_rebuilt(frozen: FrozenRun) -> bool:
    """Can this machine hold the run's network? One in four bits needs CUDA."""
    return frozen.config.adapter.kind != "qlora" or torch.cuda.is_available()


def indices_of(steps: AnySteps, step: int) -> list[int]:
    """The rows or pairs of a step, which counts from 1."""
    return [index for micro_batch in steps[step - 1].micro_batches for index in micro_batch.indices.tolist()]


def _owners(names: Names, index: int, trees: list[int]) -> list[int]:
    """The number of the document, or chat, that each target of row `index` belongs to; `trees` has its tree."""
    match names.steps:
        case TextSteps() as steps:
            places = [place for start, stop in spans_of(steps, index) for place in range(start + 1, stop)]
            return [names.documents_in(place, place + 1)[0] for place in places]
        case ChatSteps() as steps:
            return [steps.rows[index][tree] for tree in trees]
        case PairSteps():
            raise AssertionError("pairs are judged as pairs")


def _losses(
    trainer: DPOTrainer, policy: AnswerLogProbs, reference: AnswerLogProbs, pairs: PreferencePairs, indices: list[int]
) -> list[float]:
    if trainer.loss == "kto":
        desirable = torch.tensor([bool(pairs.is_desirable(index)) for index in indices])
        baseline = kl_baseline(policy.rejected, reference.rejected)
        weights = trainer.desirable_weight, trainer.undesirable_weight
        return kto_loss(policy.chosen - reference.chosen, desirable, baseline, trainer.beta, *weights).tolist()
    lengths = torch.tensor([[len(pairs[index].chosen_ids), len(pairs[index].rejected_ids)] for index in indices])
    answers = Answers(policy.chosen, policy.rejected, *lengths.unbind(dim=1))
    facts = StepFacts(mean_chosen_tokens=lengths[:, 0].double().mean().item(), kl_baseline=None)
    return preference_loss(trainer, answers, reference, facts).losses.tolist()


def _nearest(directory: Path, step: int) -> Path | None:
    """The newest whole checkpoint of fewer steps than `step`, otherwise the oldest of all."""
    whole = []
    for path in sorted(directory.glob("step-*[0-9]")):
        try:
            checkpoints.verify(path)
            whole.append(path)
        except IntegrityError:  # pruned while we look, or damaged: training says so when it continues
            continue
    before = [path for path in whole if checkpoints.step_of(path) < step]
    return before[-1] if before else next(iter(whole), None)
