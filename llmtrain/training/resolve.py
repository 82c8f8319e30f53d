"""From a checked config to a frozen run: data prepared, tokenizer, parent and teacher resolved to exact hashes."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from llmtrain.artifacts import DatasetManifest, TrainedModel
from llmtrain.config.adapter import NoAdapter, QLoRAAdapter
from llmtrain.config.data import ChatData, PreferenceData, TextData
from llmtrain.config.frozen import FrozenRun, Resolved
from llmtrain.config.model import HFModel, HFTokenizer, Qwen3Model, Tokenizer
from llmtrain.config.root import TrainConfig, context_fits
from llmtrain.config.trainer import DistillTrainer, PretrainTrainer
from llmtrain.data.once import NotMade, only_looking
from llmtrain.data.prepare import load_prepared_tokenizer, prepare_text, prepare_tokenizer
from llmtrain.data.prepare_chats import prepare_chats
from llmtrain.data.prepare_preferences import prepare_preferences
from llmtrain.data.tokenizer import tokenizer_sha256
from llmtrain.errors import IntegrityError, TokenizerMismatch, UserError
from llmtrain.models.build import shape_sha256
from llmtrain.models.pretrained import Published, directory_shape_sha256
from llmtrain.stored import StoredModel, named
from llmtrain.training import device
from llmtrain.training.parents import check_shape, check_vocabulary, latest, obtain, published_parent

Say = Callable[[str], None]
FRESH, LATEST = "scratch", "latest"


@dataclass(frozen=True)
class Inputs:
    """All that a run reads."""

    tokenizer_directory: Path
    text: DatasetManifest
    pairs: DatasetManifest | None
    chats: DatasetManifest | None
    parent: StoredModel | None
    """What training starts from; None where it starts from fresh weights."""
    teacher: StoredModel | None
    """What a distilled model learns from."""
    shape_sha256: str
    """Of the network that is trained."""

    @property
    def manifests(self) -> list[DatasetManifest]:
        """All prepared data, what is trained on last."""
        return [manifest for manifest in (self.text, self.pairs, self.chats) if manifest]

    @property
    def dataset_sha256(self) -> str:
        """`content_sha256` of what is trained on."""
        return self.manifests[-1].content_sha256


def resolve(
    config: TrainConfig, outputs: Path, train_base: Callable[[], TrainedModel], say: Say
) -> tuple[FrozenRun, Inputs]:
    """Prepare the data and find parent and teacher; `train_base` trains the one that `init_from=latest` needs but has
    not. Raises the errors of `llmtrain.errors`, a UserError where the groups do not fit each other."""
    config = config.model_copy(update={"infra": device.resolve(config.infra)})
    _adapter_fits(config)
    published = None if isinstance(config.model, Qwen3Model) else obtain(config.model, outputs, say)
    parent = _known_parent(config, published, outputs)
    tokenizer_directory = _prepared_tokenizer(config, published, parent, outputs, say)
    tokenizer_hash = (tokenizer_directory / "sha256").read_text()
    teacher = _teacher(config, tokenizer_directory, outputs)
    text, pairs, chats = _prepared_data(config, tokenizer_directory, outputs, say)
    if parent is None and _init_from(config) == LATEST:  # last: a base may have to be trained
        parent = latest(config, tokenizer_hash, outputs, train_base, say)
    if parent is not None and parent.record and parent.record.dataset_sha256 != text.content_sha256:
        say(
            f"note: {parent.label} was not trained on this corpus and split; "
            f"its held-out loss here may be of text that it has seen, or of another kind"
        )
    shape = _shape_sha256(config, published.directory if published else None)
    frozen = FrozenRun(
        config=config,
        resolved=Resolved(
            tokenizer_path=_relative(tokenizer_directory, outputs),
            tokenizer_sha256=tokenizer_hash,
            text_path=text.path,
            text_sha256=text.content_sha256,
            pairs_path=pairs.path if pairs else None,
            pairs_sha256=pairs.content_sha256 if pairs else None,
            chats_path=chats.path if chats else None,
            chats_sha256=chats.content_sha256 if chats else None,
            parent_version=parent.version if parent else None,
            parent_path=_relative(parent.directory, outputs) if parent else None,
            parent_weights_sha256=parent.weights_sha256 if parent else None,
            parent_shape_sha256=shape if published else None,
            teacher_path=_relative(teacher.directory, outputs) if teacher else None,
            teacher_weights_sha256=teacher.weights_sha256 if teacher else None,
        ),
        attempt=1,
    )
    return frozen, Inputs(tokenizer_directory, text, pairs, chats, parent, teacher, shape)


def already_prepared(config: TrainConfig, outputs: Path) -> DatasetManifest | None:
    """The prepared data that a run of `config` would learn from, where they are there; nothing is prepared or fetched.

    Files of text are hashed, as at the start of a run; a published model's weights are not.
    """
    if not (outputs / "data").is_dir():
        return None

    def silent(line: str) -> None:
        pass

    try:
        with only_looking():
            published = None if isinstance(config.model, Qwen3Model) else obtain(config.model, outputs, silent)
            if published and _init_from(config) in (FRESH, LATEST):
                parent: StoredModel | None = StoredModel(published.directory, "not hashed", None, None)
            else:
                parent = _known_parent(config, published, outputs)
            tokenizer_directory = _prepared_tokenizer(config, published, parent, outputs, silent)
            manifests = _prepared_data(config, tokenizer_directory, outputs, silent)
    except (NotMade, UserError, IntegrityError):  # what keeps a run from starting is said when one is started
        return None
    return next(manifest for manifest in reversed(manifests) if manifest)


def _prepared_tokenizer(
    config: TrainConfig, published: Published | None, parent: StoredModel | None, outputs: Path, say: Say
) -> Path:
    directory = prepare_tokenizer(_tokenizer(config, published, parent), _text_data(config), outputs, say)
    found = _fitting_tokenizer_sha256(config, published, directory)
    if parent is not None and parent.record is not None and parent.record.tokenizer_sha256 != found:
        raise IntegrityError(f"{parent.directory}: the tokenizer is not the one of the training; restore its files")
    return directory


def _prepared_data(
    config: TrainConfig, tokenizer_directory: Path, outputs: Path, say: Say
) -> tuple[DatasetManifest, DatasetManifest | None, DatasetManifest | None]:
    """(text, pairs, chats): the text, and what the trainer needs of the others."""
    text = prepare_text(_text_data(config), tokenizer_directory, outputs, say)
    longest = config.trainer.sequence_tokens
    match config.data:
        case PreferenceData() as data:
            return text, prepare_preferences(data, text, tokenizer_directory, outputs, say, max_tokens=longest), None
        case ChatData() as data:
            return text, None, prepare_chats(data, text, tokenizer_directory, outputs, say, max_tokens=longest)
        case _:
            return text, None, None


def _text_data(config: TrainConfig) -> TextData:
    return config.data if isinstance(config.data, TextData) else config.data.text()


def inputs_of(frozen: FrozenRun, outputs: Path) -> Inputs:
    """What `resolve` found when it froze the run; nothing is composed, prepared, fetched or hashed again.

    For processes that start from config.json, right after the one that wrote it. Raises IntegrityError where data or
    tokenizer are gone or others, UserError where the parent or the teacher is gone.
    """
    resolved = frozen.resolved
    tokenizer_directory = outputs / resolved.tokenizer_path
    if not (tokenizer_directory / "sha256").exists():
        raise IntegrityError(f"{tokenizer_directory}: the tokenizer is gone; run the command again that began this run")
    if (tokenizer_directory / "sha256").read_text() != resolved.tokenizer_sha256:
        raise IntegrityError(f"{tokenizer_directory} is not the tokenizer that this run was frozen with; restore it")
    text = _manifest(outputs, resolved.text_path, resolved.text_sha256)
    assert text is not None, "every run has text"
    parent = _parent_of(outputs, resolved.parent_path, resolved.parent_weights_sha256, resolved.parent_version)
    return Inputs(
        tokenizer_directory,
        text,
        _manifest(outputs, resolved.pairs_path, resolved.pairs_sha256),
        _manifest(outputs, resolved.chats_path, resolved.chats_sha256),
        parent,
        _parent_of(outputs, resolved.teacher_path, resolved.teacher_weights_sha256, None),
        _shape_sha256(frozen.config, parent.directory if parent else None),
    )


def _adapter_fits(config: TrainConfig) -> None:
    if isinstance(config.adapter, NoAdapter):
        return
    if isinstance(config.model, Qwen3Model) and _init_from(config) == FRESH:
        raise UserError(
            f"adapter={config.adapter.kind} updates weights that are good already, but trainer={config.trainer.kind} "
            f"starts {config.model.name} from fresh ones; use adapter=none, or set trainer.init_from where it has one"
        )
    if isinstance(config.adapter, QLoRAAdapter):
        if config.infra.accelerator != "cuda":
            raise UserError(
                f"adapter=qlora computes with 4-bit weights, which needs CUDA, but infra.accelerator="
                f"{config.infra.accelerator}; use adapter=lora, or infra=local_gpu on a machine with a GPU"
            )
        if find_spec("bitsandbytes") is None:
            raise UserError("adapter=qlora needs a package that is not installed; run `pip install bitsandbytes`")


def _init_from(config: TrainConfig) -> str:
    return FRESH if isinstance(config.trainer, PretrainTrainer) else config.trainer.init_from


def _known_parent(config: TrainConfig, published: Published | None, outputs: Path) -> StoredModel | None:
    """The parent, but for one that has to be looked for by its tokenizer."""
    name = _init_from(config)
    if name in (FRESH, LATEST):
        return published_parent(published) if published else None
    parent = named(name, outputs, setting="trainer.init_from")
    check_shape(parent, config.model, published, name)
    return parent


def _tokenizer(config: TrainConfig, published: Published | None, parent: StoredModel | None) -> Tokenizer:
    """A parent that was trained here keeps its tokenizer; a published one too, unless the config says otherwise."""
    match config.model:
        case HFModel(tokenizer=HFTokenizer() as tokenizer) if parent is None or parent.record is None:
            return tokenizer
        case Qwen3Model(tokenizer=tokenizer) if parent is None:
            return tokenizer
    assert parent is not None, "a published model is its own parent"
    return HFTokenizer(kind="hf", path=str(parent.directory))


def _fitting_tokenizer_sha256(config: TrainConfig, published: Published | None, directory: Path) -> str:
    """The tokenizer's hash. Raises TokenizerMismatch where it has more entries than the model has rows, UserError where
    sequences are longer than a published model's context."""
    tokenizer = load_prepared_tokenizer(directory)
    if isinstance(config.model, Qwen3Model):
        if len(tokenizer) > config.model.vocab_size:
            raise TokenizerMismatch(
                f"the tokenizer in {directory} has {len(tokenizer):,} entries, but model.vocab_size="
                f"{config.model.vocab_size}: set model.vocab_size={-(-len(tokenizer) // 128) * 128} "
                f"or choose a smaller tokenizer"
            )
    elif published is not None:
        if len(tokenizer) > published.vocab_size:
            raise TokenizerMismatch(
                f"the tokenizer in {directory} has {len(tokenizer):,} entries, but {config.model.name} has "
                f"{published.vocab_size:,} rows of embedding; choose model.tokenizer.kind=own"
            )
        if published.max_position_embeddings is not None:
            try:
                context_fits(config.trainer, published.max_position_embeddings)
            except ValueError as error:
                raise UserError(f"{config.model.name}: {error}") from error
    return tokenizer_sha256(tokenizer)


def _teacher(config: TrainConfig, tokenizer_directory: Path, outputs: Path) -> StoredModel | None:
    if not isinstance(config.trainer, DistillTrainer):
        return None
    teacher = named(config.trainer.teacher, outputs, setting="trainer.teacher")
    check_vocabulary(teacher, tokenizer_directory)
    return teacher


def _shape_sha256(config: TrainConfig, published: Path | None) -> str:
    if isinstance(config.model, Qwen3Model):
        return shape_sha256(config.model)
    assert published is not None, "a published model has a directory"
    return directory_shape_sha256(published)


def trained_on(frozen: FrozenRun, outputs: Path) -> DatasetManifest:
    """The prepared data that a run learns from. Raises IntegrityError where they are gone or others."""
    resolved = frozen.resolved
    found = (
        _manifest(outputs, resolved.chats_path, resolved.chats_sha256)
        or _manifest(outputs, resolved.pairs_path, resolved.pairs_sha256)
        or _manifest(outputs, resolved.text_path, resolved.text_sha256)
    )
    assert found is not None, "every run has text"
    return found


def _manifest(outputs: Path, path: str | None, content_sha256: str | None) -> DatasetManifest | None:
    if path is None:
        return None
    file = outputs / path / "manifest.json"
    if not file.exists():
        raise IntegrityError(f"{file} is gone; run the command again that began this run: the data are made anew")
    manifest = DatasetManifest.read(file)
    if manifest.content_sha256 != content_sha256:
        raise IntegrityError(f"{file} is of other data than this run was frozen with; restore it")
    return manifest


def _parent_of(outputs: Path, path: str | None, weights: str | None, version: str | None) -> StoredModel | None:
    if path is None:
        return None
    assert weights is not None, "a frozen parent has a hash"
    directory = outputs / path
    if not directory.is_dir():
        raise UserError(f"{directory}: the model that this run starts from, or learns from, is gone; restore it")
    record = directory.parent / "trained.json"
    return StoredModel(directory, weights, TrainedModel.read(record) if record.exists() else None, version)


def _relative(path: Path, outputs: Path) -> str:
    return os.path.relpath(path, outputs)
