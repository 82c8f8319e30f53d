"""Which number a new version gets."""

from llmtrain.artifacts import ModelVersion, TrainedModel


def numbers(version: str) -> tuple[int, int, int]:
    """ "1.2.0" -> (1, 2, 0), which sorts as versions do."""
    major, minor, patch = version.split(".")
    return int(major), int(minor), int(patch)


def next_patch(version: str) -> str:
    """ "1.2.0" -> "1.2.1"."""
    major, minor, patch = numbers(version)
    return f"{major}.{minor}.{patch + 1}"


def next_version(previous: ModelVersion | None, model: TrainedModel) -> str:
    """The semantic version of `model` after `previous`, the highest of its name; null is the first.

    Major when weights cannot be exchanged or token ids mean something else, minor when the training differs (its
    recipe, its kind, the version it started from), patch when only data or seed do.
    """
    if previous is None:
        return "1.0.0"
    major, minor, _ = numbers(previous.version)
    before = previous.model
    if (model.shape_sha256, model.tokenizer_sha256) != (before.shape_sha256, before.tokenizer_sha256):
        return f"{major + 1}.0.0"
    if (model.trainer, model.recipe_sha256, model.parent_version) != (
        before.trainer,
        before.recipe_sha256,
        before.parent_version,
    ):
        return f"{major}.{minor + 1}.0"
    return next_patch(previous.version)
