"""`config.json` of a run: the checked config with every reference resolved to an exact version and hash.

Workers, sweeps and servers start from this file; nothing is composed twice. A file of an older schema is migrated when
it is read: a setting that came later gets the value that does what was done before there was one.
"""

import json
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from llmtrain.config.base import Added, Changes, Settings, content_hash
from llmtrain.config.root import TrainConfig
from llmtrain.config.schema import exists_in, lookup, settings
from llmtrain.errors import UserError


class Resolved(BaseModel):
    """What the config's references were when the run began. Paths are relative to the outputs directory."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    tokenizer_path: str
    tokenizer_sha256: str
    text_path: str
    text_sha256: str
    pairs_path: str | None
    pairs_sha256: str | None
    chats_path: str | None = None
    chats_sha256: str | None = None
    parent_version: str | None
    """`name@version`; null when from scratch or when the parent is a run that was never registered."""
    parent_path: str | None
    parent_weights_sha256: str | None
    parent_shape_sha256: str | None = None
    """Of a published model: what its config.json says beside its weights."""
    teacher_path: str | None = None
    teacher_weights_sha256: str | None = None


class FrozenRun(BaseModel):
    """A run, ready to start anywhere."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    config: TrainConfig
    resolved: Resolved
    attempt: int
    """1, or more where `--again` asked for another run of the same mathematics."""

    @property
    def run_id(self) -> str:
        """12 hex digits of the hash of all that the mathematics depends on: model, trainer, seed, precision, and the
        content hashes of data, tokenizer and parent; not of where, how fast, or under which name it runs."""
        identity: dict[str, Any] = {
            "mathematics": self.config.fields_that_change(Changes.MATHEMATICS),
            "data": [self.resolved.text_sha256, self.resolved.pairs_sha256],
            "tokenizer": self.resolved.tokenizer_sha256,
            "parent": self.resolved.parent_weights_sha256,
        }
        if self.resolved.chats_sha256:
            identity["chats"] = self.resolved.chats_sha256
        if self.resolved.parent_shape_sha256:
            identity["shape"] = self.resolved.parent_shape_sha256
        if self.resolved.teacher_weights_sha256:
            identity["teacher"] = self.resolved.teacher_weights_sha256
        if self.attempt > 1:
            identity["attempt"] = self.attempt
        return content_hash(identity)[:12]

    @property
    def sha256(self) -> str:
        return content_hash(self.model_dump(mode="json"))


def recipe_sha256(trainer: Settings) -> str:
    """Hash of a trainer's mathematics without its seed."""
    fields = trainer.fields_that_change(Changes.MATHEMATICS)
    return content_hash({name: value for name, value in fields.items() if name != "seed"})


def thaw(path: Path) -> FrozenRun:
    """Read a frozen run of this schema or an older one. Raises UserError where the file is missing or is not one."""
    try:
        return FrozenRun.model_validate_json(json.dumps(_migrated(json.loads(path.read_bytes()), path)))
    except OSError as error:
        raise UserError(f"{path}: no frozen config to start from ({error.strerror}); give a run's directory") from error
    except (KeyError, TypeError, ValueError) as error:  # no JSON, other JSON, or a config that is not valid
        raise UserError(f"{path} is not a frozen config of this version of llmtrain: {error}") from error


def _migrated(frozen: dict[str, Any], path: Path) -> dict[str, Any]:
    """`frozen` in the form of the present schema."""
    config = frozen["config"]
    if config["schema_version"] > SCHEMA_VERSION:
        raise UserError(
            f"{path} was written by a newer llmtrain: its schema_version is {config['schema_version']}, this one reads "
            f"up to {SCHEMA_VERSION}; update llmtrain"
        )
    return {**frozen, "config": with_what_came_later(config, config["schema_version"] + 1)}


def with_what_came_later(config: dict[str, Any], first: int) -> dict[str, Any]:
    """`config`, as plain data, with the settings that the schemas from version `first` on added, where it lacks them:
    they have the values that do what was done before."""
    for version in range(first, SCHEMA_VERSION + 1):
        config = _with_what_was_added(config, version)
    return config


def _with_what_was_added(config: dict[str, Any], version: int) -> dict[str, Any]:
    """`config`, of the schema before `version`, with the settings that it added: they do what was done before."""
    config = json.loads(json.dumps(config)) | {"schema_version": version}
    if version == 4:  # there was one kind of infra; who starts the processes is infra.launch.kind now
        config["infra"].pop("kind", None)
    for setting in settings():
        *group, name = setting.key
        for note in setting.field.metadata:
            if not isinstance(note, Added) or note.version != version:
                continue
            if lookup(config, tuple(group)) is None and (name == "kind" or not setting.kinds):  # the whole group is new
                lookup(config, tuple(group[:-1]))[group[-1]] = {}
            parent = lookup(config, tuple(group))
            if parent is not None and (name == "kind" or exists_in(setting, config)):
                parent.setdefault(name, note.before)
    return config


SCHEMA_VERSION = 5
