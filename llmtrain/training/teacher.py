"""What a teacher says comes next: computed once, kept in `outputs/teacher/<key>/`, spot-checked when read.

The key is the hash of everything they depend on: weights, text (with its tokenizer), rows, k, temperature, precision.
"""

import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from llmtrain.config.base import content_hash
from llmtrain.config.infra import Infra
from llmtrain.config.trainer import DistillTrainer
from llmtrain.data.once import make_once
from llmtrain.data.text import TokenShards
from llmtrain.errors import UserError
from llmtrain.models.logit_kernels import at_least_fp32
from llmtrain.models.logprobs import equal_parts, hidden_states
from llmtrain.models.packed import Packed, document, pack
from llmtrain.training.batches import padding
from llmtrain.training.divergences import TopK, divergence, top_k
from llmtrain.training.evaluation import evaluating
from llmtrain.training.teacher_store import TeacherRows, Writer, is_whole, write_hashes

SPOT_CHECKS = 2
"""Rows of each split."""
TOLERANCE = {"fp32": 1e-4, "bf16": 1e-2}
"""Nats a token between what is kept and what is computed again: another batch composition, and rounding to fp16."""


class Text:
    """The rows of a split that a teacher is asked about: those of training, or all of a held-out split."""

    def __init__(self, shards: TokenShards, sequence_tokens: int, rows: Sequence[int] | None) -> None:
        self.shards, self.sequence_tokens = shards, sequence_tokens
        self.rows = range(-(-(shards.num_tokens - 1) // sequence_tokens)) if rows is None else rows

    def packed(self, rows: Sequence[int], infra: Infra) -> Packed:
        """`rows` in one; each token but the first is a target, the last row of a held-out split may be shorter."""
        starts = [row * self.sequence_tokens for row in rows]
        stops = [min(start + self.sequence_tokens + 1, self.shards.num_tokens) for start in starts]
        documents = (document(self.shards.tokens(*span)) for span in zip(starts, stops, strict=True))
        return pack(documents, **padding(infra))

    def batches(self, infra: Infra) -> Iterator[list[int]]:
        """`rows` in order, as many at once as make `infra.micro_batch_tokens`."""
        number = max(1, infra.micro_batch_tokens // self.sequence_tokens)
        for first in range(0, len(self.rows), number):
            yield list(self.rows[first : first + number])


def teacher_rows(
    load: Callable[[], PreTrainedModel],
    texts: dict[str, Text],
    trainer: DistillTrainer,
    *,
    vocab_size: int,
    weights_sha256: str,
    text_sha256: str,
    infra: Infra,
    outputs: Path,
    progress: Callable[[int], None],
) -> dict[str, TeacherRows]:
    """For each split, what the teacher that `load` returns says; from the store where it has it.

    Of the teacher's distribution the first `vocab_size` entries count, which are the student's. What the store holds
    is hashed, and compared with the teacher on a few rows of each split; where they differ, it is computed anew.
    `progress` is called with the targets done so far. Raises UserError where k is not less than the vocabulary.
    """
    model = load()
    entries = min(vocab_size, model.get_output_embeddings().weight.shape[0])
    if trainer.teacher_top_k >= entries:
        raise UserError(
            f"trainer.teacher_top_k={trainer.teacher_top_k} is not less than the vocabulary of {entries:,} entries; "
            f"set trainer.teacher_top_k={entries - 1} for all of it"
        )
    rows = {split: content_hash(list(text.rows)) for split, text in texts.items()}
    form = [trainer.sequence_tokens, trainer.teacher_top_k, trainer.temperature, entries, infra.precision]
    directory = outputs / "teacher" / content_hash([weights_sha256, text_sha256, rows, *form])[:16]

    def read() -> dict[str, TeacherRows]:
        return {split: TeacherRows(directory, split, trainer.teacher_top_k, trainer.sequence_tokens) for split in texts}

    if directory.exists():
        if is_whole(directory) and _agrees(model, texts, stored := read(), trainer, entries, infra):
            return stored
        print(f"{directory} does not agree with the teacher: computing it anew", file=sys.stderr)
        shutil.rmtree(directory)

    def make(aside: Path) -> None:
        done = 0
        for split, text in texts.items():
            writer = Writer(aside, split, text.rows, entries)
            for found in _top_k(model, text, trainer, entries, infra):
                writer.append(found)
                done += len(found.ids)
                progress(done)
        write_hashes(aside)

    make_once(directory, make, lambda line: print(line, file=sys.stderr))
    return read()


@torch.no_grad()
def student_figures(
    model: PreTrainedModel, text: Text, teacher: TeacherRows, trainer: DistillTrainer, infra: Infra
) -> tuple[dict[str, float], int]:
    """Over a whole split, in nats a token: `heldout_loss`, `divergence` from the teacher, and `loss`, the share of each
    as in training; and the number of targets."""
    sums, num_targets = torch.zeros(2, dtype=torch.float64), 0
    with evaluating(model, infra):
        for rows in text.batches(infra):
            packed = text.packed(rows, infra).to(model.device)
            known = teacher.of(rows, model.device)
            for here, logits in _logits(model, packed, infra):
                spread = divergence(logits, known[here], trainer.temperature, trainer.divergence)
                losses = cross_entropy(logits, packed.targets[here], reduction="none")
                sums += torch.stack([losses.double().sum(), spread.double().sum()]).cpu()
            num_targets += len(packed.targets)
    heldout_loss, mean_divergence = (sums / num_targets).tolist()
    loss = trainer.ce_weight * heldout_loss + (1 - trainer.ce_weight) * mean_divergence
    return {"loss": loss, "divergence": mean_divergence, "heldout_loss": heldout_loss}, num_targets


def unigram_divergence(
    token_counts: npt.NDArray[np.int64], text: Text, teacher: TeacherRows, trainer: DistillTrainer, infra: Infra
) -> float:
    """The divergence, in nats a token, of the model that knows only how frequent each token is (`token_counts`, to each
    of which one is added)."""
    log_frequencies = torch.from_numpy(token_counts + 1).double().log().float()  # softmax divides by their sum
    total = 0.0
    for rows in text.batches(infra):
        known = teacher.of(rows, "cpu")
        for here in equal_parts(slice(0, len(known.ids)), infra.loss_chunk_tokens):
            part = known[here]
            logits = log_frequencies.expand(len(part.ids), -1)
            total += divergence(logits, part, trainer.temperature, trainer.divergence).double().sum().item()
    return total / teacher.num_targets


@torch.no_grad()
def _agrees(
    model: PreTrainedModel,
    texts: dict[str, Text],
    stored: dict[str, TeacherRows],
    trainer: DistillTrainer,
    entries: int,
    infra: Infra,
) -> bool:
    """Does the teacher say of evenly spread rows of each split what the store says?"""
    for split, text in texts.items():
        places = sorted({number * len(text.rows) // SPOT_CHECKS for number in range(SPOT_CHECKS)})
        rows = [text.rows[place] for place in places]
        known, total = stored[split].of(rows, model.device), 0.0
        with evaluating(model, infra):
            packed = text.packed(rows, infra).to(model.device)
            if len(packed.targets) != len(known.ids):
                return False
            for here, logits in _logits(model, packed, infra):
                differences = divergence(logits[:, :entries], known[here], trainer.temperature, "forward")
                total += differences.sum().item() / trainer.temperature**2
        if not total / len(known.ids) <= TOLERANCE[infra.precision]:
            return False
    return True


@torch.no_grad()
def _top_k(model: PreTrainedModel, text: Text, trainer: DistillTrainer, entries: int, infra: Infra) -> Iterator[TopK]:
    """What the teacher says of the targets of `text`, in order."""
    for rows in text.batches(infra):
        with evaluating(model, infra):
            packed = text.packed(rows, infra).to(model.device)
            found = [
                top_k(logits[:, :entries], trainer.teacher_top_k, trainer.temperature)
                for _, logits in _logits(model, packed, infra)
            ]
        yield from found


def _logits(model: PreTrainedModel, packed: Packed, infra: Infra) -> Iterator[tuple[slice, Tensor]]:
    """[targets, vocabulary] logits, in at least fp32, of at most `infra.loss_chunk_tokens` targets at once."""
    hidden, output = hidden_states(model, packed), model.get_output_embeddings()
    for here in equal_parts(slice(0, len(hidden)), infra.loss_chunk_tokens):
        logits = output(hidden[here])
        yield here, logits.to(at_least_fp32(logits.dtype))
