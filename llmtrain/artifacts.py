"""The records that stages hand to each other. Read this file first: it is the whole flow.

    documents ──prepare──> DatasetManifest ──train──> TrainedModel ──register──> ModelVersion ──serve──> ServedModel
                                                          ├──evaluate──> Evidence ──┘ (the registry judges it)
                                                          └──optimise──> OptimisedModel ──serve──> ServedModel

Records are frozen and carry units in their names. `parents` holds the `sha256` of each record that this one was made
from: that is the lineage. Paths are relative to the outputs directory, so it may be moved or copied as a whole.
"""

from pathlib import Path
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from llmtrain.config.base import content_hash
from llmtrain.errors import IntegrityError
from llmtrain.files import sha256_of


class Record(BaseModel):
    """A frozen fact. Its identity is the hash of its content."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    parents: tuple[str, ...]
    """`sha256` of each record that this one was made from."""

    @property
    def sha256(self) -> str:
        """SHA-256, in hex, of the record as canonical JSON."""
        return content_hash(self.model_dump(mode="json"))

    def write(self, path: Path) -> None:
        """Write as JSON, for people and machines; the caller places the directory atomically."""
        path.write_text(self.model_dump_json(indent=2) + "\n")

    @classmethod
    def read(cls, path: Path) -> Self:
        """Raises IntegrityError where the file is not such a record."""
        try:
            return cls.model_validate_json(path.read_bytes())
        except ValidationError as error:
            raise IntegrityError(
                f"{path} is not a {cls.__name__}: {error}; delete its directory to make it anew"
            ) from error


class SplitCounts(BaseModel):
    """How much one split holds."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    num_documents: int
    """Documents (text), pairs (preferences) or chats."""
    num_tokens: int
    """Tokens, the end-of-text token after each document included; of a pair, prompt, chosen and rejected once each."""
    num_bytes: int
    """UTF-8 bytes of the text behind those tokens: what bits per byte are counted over."""


class DatasetManifest(Record):
    """Prepared data: `path` holds the files that `files` names."""

    kind: Literal["text", "preferences", "chats"]
    path: str
    """Directory, relative to outputs."""
    content_sha256: str
    """Hash of every document's (or pair's) text, its split, its source and its licence, and of the tokenizer: equal
    content gives equal hashes, however it was stored."""
    tokenizer_sha256: str
    """Hash of the tokenizer's vocabulary, merges, special tokens and chat template."""
    splits: dict[str, SplitCounts]
    """By the name of the split: train, validation, test."""
    sources: dict[str, str]
    """Licence of each source, by its name."""
    num_duplicates: int
    """Documents or pairs left out because an equal one was there already."""
    num_refused: int
    """Records left out because they are wrong; `refused.jsonl` in `path` says which and why."""
    files: dict[str, str]
    """SHA-256 of each file in `path`, by its name."""


class TrainedModel(Record):
    """A finished run's model: Hugging Face safetensors, tokenizer, generation config and card under `path`."""

    run_id: str
    path: str
    """Directory, relative to outputs."""
    trainer: Literal["pretrain", "sft", "dpo", "distill"]
    shape_sha256: str
    """Hash of the network's shape: two models with the same one can exchange weights."""
    weights_sha256: str
    """Hash of the safetensors files: `weights_sha256` of the directory."""
    tokenizer_sha256: str
    config_sha256: str
    """Hash of the frozen config that made it."""
    dataset_sha256: str
    """`content_sha256` of the data that it was trained on."""
    recipe_sha256: str
    """Hash of the trainer's mathematics without its seed: equal for two runs that differ in data or seed only."""
    parent_version: str | None
    """`name@version` of the model that training started from; null when from scratch."""
    num_tokens_seen: int
    metrics: dict[str, float]
    """The last figures, on splits that were not trained on; the keys carry the units."""


Form = Literal["trained", "onnx_fp32", "onnx_int8", "onnx_int4", "safetensors_int8", "safetensors_int4"]
"""What a model's weights are stored as: as they were trained, or as `llmtrain optimise` made them."""


class OptimisedModel(Record):
    """A model in another form, complete with tokenizer and generation config, under `path`. `parents` holds the record
    that it was made from, where there is one."""

    form: Form
    path: str
    """Directory, relative to outputs: `optimised/<12 digits of the source's weights>/<form>`."""
    source_weights_sha256: str
    """`weights_sha256` of the model that it was made from."""
    files: dict[str, str]
    """SHA-256 of each file in `path`, by its name."""
    settings: dict[str, str | int | float | bool | None]
    """How it was made: the settings of the group `optimise` that change the result."""
    num_bytes: int
    """Of the weights' files."""
    metrics: dict[str, float]
    """Measured on one machine; the keys carry the units."""

    def damaged(self, directory: Path) -> Path | None:
        """The first of `files` that is missing in `directory` or is not what was made; None where all are whole."""
        wrong = (directory / name for name, known in self.files.items()
                 if not (directory / name).exists() or sha256_of(directory / name) != known)  # fmt: skip
        return next(wrong, None)


class ServedModel(Record):
    """What an endpoint serves; everything but names and places comes from the model's own records."""

    label: str
    """`name@version`, or the run's directory."""
    name: str
    """What requests call it."""
    form: Form
    path: str
    """Directory with tokenizer, config and weights; relative to outputs where it lies in them."""
    weights_sha256: str
    """Of the trained weights."""
    precision: Literal["fp32", "bf16"]
    """What products are computed in: as trained. A quantised form has its own."""
    context_tokens: int
    stop_ids: tuple[int, ...]
    """Tokens that end an answer."""
    template_sha256: str | None
    """Of the chat template's text; null where the tokenizer has none."""


class Evidence(Record):
    """Figures about one model, measured by one procedure."""

    procedure: str
    """What was measured, as `package.function`."""
    figures: dict[str, float]


class ModelVersion(Record):
    """A registered model: `name@version` is immutable, its weights are named by hash."""

    name: str
    version: str
    """Semantic version: major when the shape or the tokenizer changes, minor when the training does, patch when only
    data or seed do."""
    model: TrainedModel
    registered_at_utc: str
    """ISO 8601, whole seconds."""

    @property
    def label(self) -> str:
        return f"{self.name}@{self.version}"


def weights_sha256(directory: Path) -> str:
    """SHA-256, in hex, over the names and contents of the `*.safetensors` files of a model's directory.

    Raises IntegrityError where there is none.
    """
    files = sorted(directory.glob("*.safetensors"))
    if not files:
        raise IntegrityError(f"{directory} holds no *.safetensors file; restore it from a copy or train again")
    return content_hash([[path.name, sha256_of(path)] for path in files])
