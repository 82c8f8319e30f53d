"""The end of a run: its model as a directory, and the records that say what it is."""

import os
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from llmtrain.artifacts import Evidence, TrainedModel, weights_sha256
from llmtrain.config.adapter import NoAdapter
from llmtrain.config.base import Changes, content_hash
from llmtrain.config.frozen import FrozenRun, recipe_sha256
from llmtrain.config.model import HFModel, Qwen3Model
from llmtrain.errors import IntegrityError
from llmtrain.files import write_whole
from llmtrain.models import directory as model_directory
from llmtrain.models.adapter import is_attached, merge, save_adapter
from llmtrain.models.modes import evaluating
from llmtrain.models.pretrained import is_on_the_hub
from llmtrain.training.card import model_card
from llmtrain.training.resolve import Inputs

MERGED_TOLERANCE = 1e-4
"""||difference|| / ||logits|| of one row, fp32: rounding of a product with a sum against the sum of two products."""


def export(
    frozen: FrozenRun,
    model: PreTrainedModel,
    inputs: Inputs,
    outputs: Path,
    directory: Path,
    figures: Mapping[str, float],
    num_tokens_seen: int,
) -> TrainedModel:
    """Write `model/`, `adapter/` where there is one, `trained.json` and `evidence.json` to the run's `directory`.

    `figures` are the last ones. An adapter is merged into `model`, which is plain afterwards. Raises IntegrityError
    where the model that was written is not the live one, or a merged one computes something else.
    """
    config = frozen.config
    if is_attached(model):
        save_adapter(model, directory / "adapter", _name_of_base(frozen, directory, outputs))
        _merge(model, exact=config.infra.precision == "fp32")
    card = model_card(frozen, inputs.manifests, dict(figures))
    model_directory.save(model, inputs.tokenizer_directory, directory / "model", card)
    records = [parent.record.sha256 for parent in (inputs.parent, inputs.teacher) if parent and parent.record]
    trained = TrainedModel(
        parents=(*(manifest.sha256 for manifest in inputs.manifests), *records),
        run_id=frozen.run_id,
        path=(directory / "model").relative_to(outputs).as_posix(),
        trainer=config.trainer.kind,
        shape_sha256=inputs.shape_sha256,
        weights_sha256=weights_sha256(directory / "model"),
        tokenizer_sha256=frozen.resolved.tokenizer_sha256,
        config_sha256=frozen.sha256,
        dataset_sha256=inputs.dataset_sha256,
        recipe_sha256=_recipe_sha256(frozen),
        parent_version=frozen.resolved.parent_version,
        num_tokens_seen=num_tokens_seen,
        metrics=dict(figures),
    )
    write_whole(directory / "trained.json", trained.model_dump_json(indent=2) + "\n")
    evidence = Evidence(parents=(trained.sha256,), procedure="llmtrain.training.tasks", figures=dict(figures))
    write_whole(directory / "evidence.json", evidence.model_dump_json(indent=2) + "\n")
    return trained


def _merge(model: PreTrainedModel, *, exact: bool) -> None:
    """Merge the adapter; raises IntegrityError where the logits of one row are others than before.

    Products of lower precision than fp32 round a merged weight otherwise than its two parts: there nothing is compared.
    """
    before = _logits(model)
    merge(model)
    after = _logits(model)
    difference = ((after - before).norm() / before.norm()).item()
    if exact and not difference <= MERGED_TOLERANCE:
        raise IntegrityError(
            f"the merged model's logits differ from the adapter's by {difference:.1e} (at most {MERGED_TOLERANCE:.0e} "
            f"is rounding); the adapter and the checkpoints are intact"
        )


@torch.no_grad()
def _logits(model: PreTrainedModel) -> Tensor:
    ids = (torch.arange(32, device=model.device) * 7919 % model.config.vocab_size)[None]
    with evaluating(model):
        logits: Tensor = model(input_ids=ids, use_cache=False).logits
    return logits.float()


def _recipe_sha256(frozen: FrozenRun) -> str:
    """Hash of the training's mathematics without its seed: the trainer's, the adapter's, and the published weights that
    it began with, which no version names."""
    config, resolved = frozen.config, frozen.resolved
    recipe = recipe_sha256(config.trainer)
    more: dict[str, object] = {}
    if not isinstance(config.adapter, NoAdapter):
        more["adapter"] = config.adapter.fields_that_change(Changes.MATHEMATICS)
    if not isinstance(config.model, Qwen3Model) and resolved.parent_version is None:
        more["weights"] = resolved.parent_weights_sha256
    if resolved.teacher_weights_sha256:
        more["teacher"] = resolved.teacher_weights_sha256
    return content_hash({"trainer": recipe, **more}) if more else recipe


def _name_of_base(frozen: FrozenRun, directory: Path, outputs: Path) -> str:
    """What the adapter's config calls its base: a hub id, or the base's directory as seen from the adapter's."""
    model, resolved = frozen.config.model, frozen.resolved
    if isinstance(model, HFModel) and resolved.parent_version is None and is_on_the_hub(model):
        return model.path
    assert resolved.parent_path is not None, "an adapter has a base"
    return os.path.relpath(outputs / resolved.parent_path, directory / "adapter")
