"""The reference's log-probabilities: computed once, kept in `outputs/reference/<key>/`, spot-checked when read.

The key is the hash of everything they depend on: weights, pairs (with their tokenizer and template) and precision.
"""

import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save_file
from transformers import PreTrainedModel

from llmtrain.config.base import content_hash
from llmtrain.config.infra import Infra
from llmtrain.data.once import make_once
from llmtrain.data.preferences import PreferencePairs
from llmtrain.files import sha256_of
from llmtrain.training.batches import AnswerLogProbs
from llmtrain.training.evaluation import score_pairs

FILE = "logprobs.safetensors"
SPOT_CHECKS = 4
TOLERANCE = {"fp32": 1e-4, "bf16": 2e-2}
"""Relative difference that another batch composition may cause."""


def reference_log_probs(
    model: PreTrainedModel,
    splits: dict[str, PreferencePairs],
    *,
    weights_sha256: str,
    pairs_sha256: str,
    form: list[Any],
    infra: Infra,
    outputs: Path,
    progress: Callable[[int], None],
) -> dict[str, AnswerLogProbs]:
    """For each split, the answers' log-probabilities under `model`; from the store where it has them.

    `form` says what else than the pairs themselves decides what is scored; empty for pairs as they are.
    What the store holds is compared with `model` on a few pairs of each split; where they differ, it is computed anew.
    """
    key = content_hash([weights_sha256, pairs_sha256, infra.precision, *form])[:16]
    directory = outputs / "reference" / key
    if directory.exists():
        stored = _read(directory)
        if stored is not None and _agrees(model, splits, stored, infra):
            return stored
        print(f"{directory} does not agree with the reference: computing it anew", file=sys.stderr)
        shutil.rmtree(directory)

    def make(aside: Path) -> None:
        tensors: dict[str, torch.Tensor] = {}
        before = 0
        for split, pairs in splits.items():

            def from_the_start(num_tokens: int, before: int = before) -> None:
                progress(before + num_tokens)

            scores = score_pairs(model, pairs, list(range(len(pairs))), infra, from_the_start)
            tensors |= {f"{split}.chosen": scores.chosen, f"{split}.rejected": scores.rejected}
            before += sum(pairs.num_tokens(index) for index in range(len(pairs)))
        save_file(tensors, aside / FILE)
        (aside / "sha256").write_text(sha256_of(aside / FILE))

    make_once(directory, make, lambda line: print(line, file=sys.stderr))
    made = _read(directory)
    assert made is not None, "what was just written can be read"
    return made


def _read(directory: Path) -> dict[str, AnswerLogProbs] | None:
    try:
        if (directory / "sha256").read_bytes() != sha256_of(directory / FILE).encode():
            return None
        tensors = load((directory / FILE).read_bytes())  # no memory map: the file may be replaced while it is used
    except (OSError, SafetensorError):
        return None
    splits = {name.partition(".")[0] for name in tensors}
    return {split: AnswerLogProbs(tensors[f"{split}.chosen"], tensors[f"{split}.rejected"]) for split in splits}


def _agrees(
    model: PreTrainedModel, splits: dict[str, PreferencePairs], stored: dict[str, AnswerLogProbs], infra: Infra
) -> bool:
    """Are evenly spread pairs of each split scored as the store says?"""
    for split, pairs in splits.items():
        if split not in stored or len(stored[split].chosen) != len(pairs):
            return False
        indices = sorted({i * len(pairs) // SPOT_CHECKS for i in range(SPOT_CHECKS)})
        fresh = score_pairs(model, pairs, indices, infra)
        for side in ("chosen", "rejected"):
            tolerance = TOLERANCE[infra.precision]
            if not torch.allclose(
                getattr(stored[split], side)[indices], getattr(fresh, side), rtol=tolerance, atol=1e-3
            ):
                return False
    return True
