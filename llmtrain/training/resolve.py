"""From a checked config to a frozen run: data prepared, tokenizer and parent resolved to exact hashes."""

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from llmtrain.artifacts import DatasetManifest, ModelVersion, TrainedModel, weights_sha256
from llmtrain.config.data import PreferenceData
from llmtrain.config.frozen import FrozenRun, Resolved
from llmtrain.config.model import HFTokenizer, Tokenizer
from llmtrain.config.root import TrainConfig
from llmtrain.config.trainer import DPOTrainer
from llmtrain.data.prepare import load_prepared_tokenizer, prepare_text, prepare_tokenizer
from llmtrain.data.prepare_preferences import prepare_preferences
from llmtrain.data.tokenizer import tokenizer_sha256
from llmtrain.errors import CheckpointMismatch, IntegrityError, TokenizerMismatch, UserError
from llmtrain.models.build import hf_config, shape_sha256
from llmtrain.registry.registry import Registry
from llmtrain.training import device

Say = Callable[[str], None]


@dataclass(frozen=True)
class Parent:
    """The model that training starts from."""

    model: TrainedModel
    directory: Path
    """Where its weights and tokenizer are."""
    version: ModelVersion | None
    """None when it is a run that was not registered."""


@dataclass(frozen=True)
class Inputs:
    """All that a run reads."""

    tokenizer_directory: Path
    text: DatasetManifest
    pairs: DatasetManifest | None
    parent: Parent | None

    @property
    def dataset_sha256(self) -> str:
        """`content_sha256` of what is trained on."""
        return (self.pairs or self.text).content_sha256


def resolve(
    config: TrainConfig, outputs: Path, train_base: Callable[[], TrainedModel], say: Say
) -> tuple[FrozenRun, Inputs]:
    """Prepare the data and find the parent; `train_base` trains the one that `init_from=latest` needs but has not."""
    config = config.model_copy(update={"infra": device.resolve(config.infra)})
    text_data = config.data.text() if isinstance(config.data, PreferenceData) else config.data
    parent = None
    if isinstance(config.trainer, DPOTrainer) and config.trainer.init_from != "latest":
        parent = _named_parent(config, config.trainer.init_from, outputs)
        tokenizer: Tokenizer = HFTokenizer(kind="hf", path=str(parent.directory))
    else:
        tokenizer = config.model.tokenizer
    tokenizer_directory = prepare_tokenizer(tokenizer, text_data, outputs, say)
    tokenizer_hash = _fitting_tokenizer_sha256(config, tokenizer_directory)
    if parent is not None and parent.model.tokenizer_sha256 != tokenizer_hash:
        raise IntegrityError(f"{parent.directory}: the tokenizer is not the one of the training; restore its files")
    text = prepare_text(text_data, tokenizer_directory, outputs, say)
    pairs = None
    if isinstance(config.data, PreferenceData):
        pairs = prepare_preferences(
            config.data, text, tokenizer_directory, outputs, say, max_tokens=config.trainer.sequence_tokens
        )
    if isinstance(config.trainer, DPOTrainer) and parent is None:  # last: a base may have to be trained
        parent = _latest_parent(config, tokenizer_hash, outputs, train_base, say)
    if parent is not None and parent.model.dataset_sha256 != text.content_sha256:
        say(
            f"note: {_label(parent)} was not trained on this corpus and split; "
            f"its held-out loss here may be of text that it has seen, or of another kind"
        )
    frozen = FrozenRun(
        config=config,
        resolved=Resolved(
            tokenizer_path=_relative(tokenizer_directory, outputs),
            tokenizer_sha256=tokenizer_hash,
            text_path=text.path,
            text_sha256=text.content_sha256,
            pairs_path=pairs.path if pairs else None,
            pairs_sha256=pairs.content_sha256 if pairs else None,
            parent_version=parent.version.label if parent and parent.version else None,
            parent_path=_relative(parent.directory, outputs) if parent else None,
            parent_weights_sha256=parent.model.weights_sha256 if parent else None,
        ),
        attempt=1,
    )
    return frozen, Inputs(tokenizer_directory, text, pairs, parent)


def _fitting_tokenizer_sha256(config: TrainConfig, directory: Path) -> str:
    """The tokenizer's hash. Raises TokenizerMismatch where it has more entries than the model has rows."""
    tokenizer = load_prepared_tokenizer(directory)
    if len(tokenizer) > config.model.vocab_size:
        raise TokenizerMismatch(
            f"the tokenizer in {directory} has {len(tokenizer):,} entries, but model.vocab_size="
            f"{config.model.vocab_size}: set model.vocab_size={-(-len(tokenizer) // 128) * 128} "
            f"or choose a smaller tokenizer"
        )
    return tokenizer_sha256(tokenizer)


def _latest_parent(
    config: TrainConfig, tokenizer_hash: str, outputs: Path, train_base: Callable[[], TrainedModel], say: Say
) -> Parent:
    registry, shape = Registry(outputs), shape_sha256(config.model)
    version = registry.latest(shape, tokenizer_hash, trainer="pretrain")
    if version is None:
        say(
            f"trainer.init_from=latest: no pretrained {config.model.name} with this tokenizer is registered; "
            f"training it first"
        )
        train_base()
        version = registry.latest(shape, tokenizer_hash, trainer="pretrain")
        assert version is not None, "the pretraining that was just done is not the one that was asked for"
    say(f"trainer.init_from=latest is {version.label}")
    registry.verify(version)
    return Parent(version.model, registry.directory(version), version)


def _named_parent(config: TrainConfig, name: str, outputs: Path) -> Parent:
    """Raises UserError where `name` names nothing, CheckpointMismatch where it is a model of another shape."""
    record = Path(name) / "trained.json"
    if record.exists():
        parent = Parent(TrainedModel.read(record), Path(name) / "model", None)
        if weights_sha256(parent.directory) != parent.model.weights_sha256:
            raise IntegrityError(f"{parent.directory}: the weights are not those that {record} names; restore them")
    elif "@" in name:
        registry = Registry(outputs)
        version = registry.get(name)
        registry.verify(version)
        parent = Parent(version.model, registry.directory(version), version)
    else:
        raise UserError(
            f"trainer.init_from={name}: no finished run is in that directory and it is no name@version; "
            f"`llmtrain models` lists the versions"
        )
    if parent.model.shape_sha256 != shape_sha256(config.model):
        theirs = json.loads((parent.directory / "config.json").read_text())
        ours = hf_config(config.model).to_dict()
        keys = set(type(config.model).model_fields) & theirs.keys() & ours.keys()
        differences = [
            f"{key}={theirs[key]} (the config asks for {ours[key]})" for key in sorted(keys) if theirs[key] != ours[key]
        ]
        raise CheckpointMismatch(
            f"trainer.init_from={name} is a model of another shape: "
            f"{', '.join(differences) or 'other rotary settings'}; "
            f"choose the model= that it was trained with, or another version"
        )
    return parent


def _label(parent: Parent) -> str:
    return parent.version.label if parent.version else str(parent.directory.parent)


def _relative(path: Path, outputs: Path) -> str:
    return os.path.relpath(path, outputs)
