"""Models by name: a finished run's directory, a model's, or a version of the registry."""

from dataclasses import dataclass
from pathlib import Path

from llmtrain.artifacts import TrainedModel, weights_sha256
from llmtrain.errors import IntegrityError, UserError
from llmtrain.models.pretrained import check_files
from llmtrain.registry.registry import Registry


@dataclass(frozen=True)
class StoredModel:
    """A model's files, and what is recorded of them."""

    directory: Path
    """Where its weights and tokenizer are."""
    weights_sha256: str
    record: TrainedModel | None
    """None where it was not trained by llmtrain."""
    version: str | None
    """`name@version`; None where it was not registered."""

    @property
    def label(self) -> str:
        """What people call it."""
        return self.version or str(self.directory.parent if self.record else self.directory)


def named(name: str, outputs: Path, *, setting: str) -> StoredModel:
    """The model that `setting` names: a run's directory, a model's, or `name@version`; its weights are hashed.

    Raises UserError where `name` names nothing, IntegrityError where the weights are not those of its record.
    """
    directory = Path(name).expanduser()
    record = directory / "trained.json"
    if record.exists():
        trained = TrainedModel.read(record)
        found = weights_sha256(directory / "model")
        if found != trained.weights_sha256:
            raise IntegrityError(f"{directory / 'model'}: the weights are not those that {record} names; restore them")
        return StoredModel(directory / "model", found, trained, None)
    if (directory / "config.json").exists() and not (directory / "checkpoints").exists():
        check_files(directory)
        return StoredModel(directory, weights_sha256(directory), None, None)
    if "@" in name:
        return registered(name, outputs)
    raise UserError(
        f"{setting}={name}: no finished run and no model is in that directory, and it is no name@version; "
        f"`llmtrain models` lists the versions"
    )


def registered(reference: str, outputs: Path) -> StoredModel:
    """The version that `name@1.2.0`, `name@alias` or `name` (its highest) means; its weights are hashed.

    Raises UserError where there is none, IntegrityError where the weights are not the registered ones.
    """
    registry = Registry(outputs)
    version = registry.get(reference)
    registry.verify(version)
    return StoredModel(registry.directory(version), version.model.weights_sha256, version.model, version.label)
