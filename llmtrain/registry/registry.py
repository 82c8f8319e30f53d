"""The registry: `name@version` for trained models, on MLflow's model registry in the outputs directory's database.

MLflow is what counts; the journal follows. A kill between the two leaves a version without its event, which the next
use of the registry appends.
"""

from datetime import UTC, datetime
from difflib import get_close_matches
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import ValidationError

from llmtrain.artifacts import ModelVersion, TrainedModel, weights_sha256
from llmtrain.errors import IntegrityError, UserError
from llmtrain.journal import Journal
from llmtrain.registry.semver import next_patch, next_version, numbers
from llmtrain.telemetry.database import ARTIFACT_ROOT, database_path, in_words, locked, open_database

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion as MLflowModelVersion

RECORD_TAG = "llmtrain.model_version"
"""Tag of an MLflow model version with the whole ModelVersion as JSON; versions that others made have none."""
EVENT = "model.registered"


class Registry:
    """The registered models of one outputs directory. Reading an empty one creates nothing."""

    def __init__(self, outputs: Path) -> None:
        self.outputs = outputs
        self.journal = Journal(outputs)

    def register(self, name: str, model: TrainedModel, *, tracker_run_id: str | None) -> ModelVersion:
        """Give `model` the next version of `name`; the same run with the same weights keeps the version it has.

        `tracker_run_id` links the version to its MLflow run. Raises UserError for a name that cannot be one, and as
        `database.in_words` does.
        """
        _check_name(name)
        client = self._client
        with in_words(self.outputs), locked(self.outputs):
            versions = self._stored()
            self._complete_journal(versions)
            earlier = [version for version in versions if version.name == name]
            for version in earlier:
                if (version.model.run_id, version.model.weights_sha256) == (model.run_id, model.weights_sha256):
                    return version
            highest = max(earlier, key=lambda version: numbers(version.version), default=None)
            number = next_version(highest, model)
            while f"{name}@{number}" in self._told():  # was given, and deleted in MLflow since: never given twice
                number = next_patch(number)
            version = ModelVersion(
                parents=(model.sha256,),
                name=name,
                version=number,
                model=model,
                registered_at_utc=datetime.now(UTC).isoformat(timespec="seconds"),
            )
            if not client.search_registered_models(f"name = '{name}'"):
                client.create_registered_model(name)
            client.create_model_version(
                name,
                source=ARTIFACT_ROOT + model.path,  # for people: weights are read from outputs, not through MLflow
                run_id=tracker_run_id,
                tags=_tags(version),
                description=_description(version),
            )
            self._complete_journal([version])
        return version

    def versions(self, name: str | None = None) -> list[ModelVersion]:
        """All versions, or those of one name, oldest first."""
        if not database_path(self.outputs).exists():
            return []
        with in_words(self.outputs):
            versions = self._stored()
        if not {version.label for version in versions} <= self._told().keys():
            with locked(self.outputs):
                self._complete_journal(versions)
        return [version for version in versions if name in (None, version.name)]

    def get(self, reference: str) -> ModelVersion:
        """The version that `name@1.2.0` or `name@alias` means; `name` alone means its highest one.

        Aliases are MLflow's. Raises UserError for any other reference.
        """
        name, _, number = reference.partition("@")
        versions = self.versions()
        found = [version for version in versions if version.name == name and number in ("", version.version)]
        if found:
            return max(found, key=lambda version: numbers(version.version))
        if (version := self._by_alias(name, number, versions)) is not None:
            return version
        if not versions:
            raise UserError(
                f"{reference}: no such version; {self.outputs} has no registered model yet, train one first"
            )
        labels = [version.label for version in versions]
        close = get_close_matches(reference, [*labels, *{version.name for version in versions}], n=1)
        hint = f"did you mean {close[0]}? " if close else ""
        raise UserError(f"{reference}: no such version in {self.outputs}; {hint}There are: {', '.join(labels)}")

    def _by_alias(self, name: str, alias: str, versions: list[ModelVersion]) -> ModelVersion | None:
        if not alias or name not in {version.name for version in versions}:
            return None
        with in_words(self.outputs):
            number = self._client.get_registered_model(name).aliases.get(alias)
            return None if number is None else _record(self._client.get_model_version(name, str(number)))

    def latest(
        self,
        shape_sha256: str,
        tokenizer_sha256: str,
        trainer: Literal["pretrain", "sft", "dpo", "distill"] = "pretrain",
    ) -> ModelVersion | None:
        """The version, of any name, registered last with this shape, this tokenizer and this kind of training."""
        wanted = (shape_sha256, tokenizer_sha256, trainer)
        for version in reversed(self.versions()):
            if (version.model.shape_sha256, version.model.tokenizer_sha256, version.model.trainer) == wanted:
                return version
        return None

    def directory(self, version: ModelVersion) -> Path:
        """Where the model's files are. Raises UserError where they were deleted."""
        directory = self.outputs / version.model.path
        if not directory.is_dir():
            raise UserError(
                f"{version.label} is registered, but its files are gone from {directory}; "
                f"restore them from a copy, or train it again (run {version.model.run_id})"
            )
        return directory

    def verify(self, version: ModelVersion) -> None:
        """Raises IntegrityError unless the weights are the registered ones, UserError where they were deleted."""
        directory = self.directory(version)
        found = weights_sha256(directory)
        if found != version.model.weights_sha256:
            raise IntegrityError(
                f"{version.label}: the weights in {directory} have SHA-256 {found}, registered were "
                f"{version.model.weights_sha256}; restore them from a copy, or train again"
            )

    @cached_property
    def _client(self) -> "MlflowClient":
        return open_database(self.outputs)

    def _stored(self) -> list[ModelVersion]:
        """What MLflow holds, oldest first: in the journal's order, because clocks jump."""
        found = []
        token = None
        while token != "":
            page = self._client.search_model_versions(max_results=1000, page_token=token)
            found += [version for version in page if RECORD_TAG in version.tags]
            token = page.token or ""
        found.sort(key=lambda version: (version.creation_timestamp, version.name, int(version.version)))
        told = self._told()
        return sorted(map(_record, found), key=lambda version: told.get(version.label, len(told)))

    def _told(self) -> dict[str, int]:
        """Labels of the versions that the journal has an event of, with their places in it."""
        labels = [event["facts"]["version"] for event in self.journal.events() if event["event"] == EVENT]
        return {label: place for place, label in enumerate(labels)}

    def _complete_journal(self, versions: list[ModelVersion]) -> None:
        """Tell the journal of those versions that it has no event of. Under the lock, or two would."""
        told = self._told()
        for version in versions:
            if version.label not in told:
                self.journal.append(
                    EVENT,
                    version=version.label,
                    sha256=version.sha256,
                    run_id=version.model.run_id,
                    weights_sha256=version.model.weights_sha256,
                    parent_version=version.model.parent_version,
                )


def _check_name(name: str) -> None:
    wrong = sorted(set(name) & set("/:@'"))
    if wrong or name != name.strip() or not name:
        reason = f"has {' '.join(wrong)}" if wrong else "is empty or begins or ends with a space"
        raise UserError(f"name={name!r} cannot name a registered model: it {reason}; choose letters, digits, - _ .")


def _record(stored: "MLflowModelVersion") -> ModelVersion:
    try:
        return ModelVersion.model_validate_json(stored.tags[RECORD_TAG])
    except ValidationError as error:
        raise IntegrityError(
            f"version {stored.version} of {stored.name} in MLflow has no ModelVersion in its tag {RECORD_TAG} "
            f"({error}); restore the database from a backup, or delete that version in MLflow"
        ) from error


def _tags(version: ModelVersion) -> dict[str, str]:
    """What MLflow's pages show and search by, besides the record itself."""
    model = version.model
    readable = {
        "semver": version.version,
        "run_id": model.run_id,
        "trainer": model.trainer,
        "config_sha256": model.config_sha256,
        "dataset_sha256": model.dataset_sha256,
        "parent": model.parent_version or "none",
        **{key: f"{value:.6g}" for key, value in model.metrics.items()},
    }
    return {f"llmtrain.{key}": value for key, value in readable.items()} | {RECORD_TAG: version.model_dump_json()}


def _description(version: ModelVersion) -> str:
    model = version.model
    start = f"starting from {model.parent_version}" if model.parent_version else "from scratch"
    return f"{version.label}: {model.trainer} {start}, {model.num_tokens_seen:,} tokens, in {model.path} of outputs."
