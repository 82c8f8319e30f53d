"""`data=`: which text, which preferences, and how they are split."""

from typing import Annotated, Literal

from annotated_types import Ge, Gt, Le, Lt, MinLen
from pydantic import Discriminator

from llmtrain.config.base import Changes, Settings


class PythonDocs(Settings):
    """The documentation that every interpreter carries: `pydoc_data.topics` and the standard library's docstrings."""

    kind: Annotated[Literal["python_docs"], Changes.DATA]


class TextFiles(Settings):
    """UTF-8 text files, one document each."""

    kind: Annotated[Literal["files"], Changes.DATA]
    paths: Annotated[tuple[str, ...], MinLen(1), Changes.SURFACE]
    """Files or globs (`**` allowed), relative to the working directory. The prepared data's key has their content."""
    licence: Annotated[str, Changes.DATA]
    """Licence of the text (an SPDX id, or `proprietary`): carried to the manifest and the model card."""


class JsonlText(Settings):
    """JSON lines, one document each."""

    kind: Annotated[Literal["jsonl"], Changes.DATA]
    paths: Annotated[tuple[str, ...], MinLen(1), Changes.SURFACE]
    """Files or globs, relative to the working directory. The prepared data's key has their content."""
    text_field: Annotated[str, Changes.DATA]
    """The field that holds the text."""
    licence: Annotated[str, Changes.DATA]
    """Licence of the text (an SPDX id, or `proprietary`)."""


Corpus = Annotated[PythonDocs | TextFiles | JsonlText, Discriminator("kind")]


class Continuations(Settings):
    """Pairs made from `data.corpus`: a passage's true continuation against another document's text of equal length."""

    kind: Annotated[Literal["continuations"], Changes.DATA]
    prompt_characters: Annotated[int, Gt(0), Changes.DATA]
    """Characters shown before the answer."""
    answer_characters: Annotated[int, Gt(0), Changes.DATA]
    """Characters of each answer, chosen and rejected alike."""
    max_training_pairs: Annotated[int | None, Gt(0), Changes.DATA]
    """Most pairs to train on, spread over the documents; null takes all. Validation and test keep all of theirs."""


class PreferenceFile(Settings):
    """JSON lines of {"prompt": str, "chosen": str, "rejected": str}; further fields are ignored."""

    kind: Annotated[Literal["jsonl"], Changes.DATA]
    paths: Annotated[tuple[str, ...], MinLen(1), Changes.SURFACE]
    """Files or globs, relative to the working directory. The prepared data's key has their content."""
    licence: Annotated[str, Changes.DATA]
    """Licence of the pairs (an SPDX id, or `proprietary`)."""
    template: Annotated[Literal["plain", "chat"], Changes.DATA]
    """`plain`: prompt, answer, end-of-text. `chat`: the prompt as the user's turn of the tokenizer's chat template."""


Pairs = Annotated[Continuations | PreferenceFile, Discriminator("kind")]


class _Data(Settings):
    corpus: Corpus
    split_seed: Annotated[int, Ge(0), Changes.DATA]
    """Decides which document (or prompt) falls into which split."""
    validation_share: Annotated[float, Gt(0), Lt(0.5), Changes.DATA]
    """Share of the documents (or prompts) kept for validation while training."""
    test_share: Annotated[float, Gt(0), Lt(0.5), Changes.DATA]
    """Share of the documents (or prompts) kept for the last figures."""
    max_refused_share: Annotated[float, Ge(0), Le(1), Changes.DATA]
    """Share of refused records above which the preparation stops."""
    shard_tokens: Annotated[int, Gt(0), Changes.DATA]
    """Tokens in one memory-mapped file."""


class TextData(_Data):
    """Text for pretraining."""

    kind: Annotated[Literal["text"], Changes.DATA]


class PreferenceData(_Data):
    """Preference pairs; `corpus` trains the tokenizer, measures the held-out loss, and builds a missing base model."""

    kind: Annotated[Literal["preferences"], Changes.DATA]
    pairs: Pairs

    def text(self) -> TextData:
        """The same corpus as pretraining data, split the same way, so that what is held out stays held out."""
        values = {name: getattr(self, name) for name in _Data.model_fields}
        return TextData(kind="text", **values)


Data = Annotated[TextData | PreferenceData, Discriminator("kind")]
