"""The end of a run: its model as a directory, and the records that say what it is."""

from pathlib import Path

from llmtrain.artifacts import Evidence, TrainedModel, weights_sha256
from llmtrain.config.frozen import FrozenRun, recipe_sha256
from llmtrain.files import write_whole
from llmtrain.models import directory as model_directory
from llmtrain.models.build import shape_sha256
from llmtrain.training.card import model_card
from llmtrain.training.resolve import Inputs
from llmtrain.training.tasks import Figures, Task


def export(
    frozen: FrozenRun, task: Task, inputs: Inputs, outputs: Path, directory: Path, figures: Figures
) -> TrainedModel:
    """Write `model/`, `trained.json` and `evidence.json` to the run's `directory`; `figures` are the last ones.

    Raises IntegrityError where the model that was written is not the live one.
    """
    config, parent = frozen.config, inputs.parent
    manifests = [manifest for manifest in (inputs.text, inputs.pairs) if manifest]
    card = model_card(frozen, manifests, figures)
    model_directory.save(task.module.model, inputs.tokenizer_directory, directory / "model", card)
    trained = TrainedModel(
        parents=tuple(manifest.sha256 for manifest in manifests) + ((parent.model.sha256,) if parent else ()),
        run_id=frozen.run_id,
        path=(directory / "model").relative_to(outputs).as_posix(),
        trainer=config.trainer.kind,
        shape_sha256=shape_sha256(config.model),
        weights_sha256=weights_sha256(directory / "model"),
        tokenizer_sha256=frozen.resolved.tokenizer_sha256,
        config_sha256=frozen.sha256,
        dataset_sha256=inputs.dataset_sha256,
        recipe_sha256=recipe_sha256(config.trainer),
        parent_version=frozen.resolved.parent_version,
        num_tokens_seen=task.module.tokens,
        metrics=figures,
    )
    write_whole(directory / "trained.json", trained.model_dump_json(indent=2) + "\n")
    evidence = Evidence(parents=(trained.sha256,), procedure="llmtrain.training.tasks", figures=figures)
    write_whole(directory / "evidence.json", evidence.model_dump_json(indent=2) + "\n")
    return trained
