"""`data=`: which text, which preferences, and how they are split."""

from typing import Annotated, Literal

from annotated_types import Ge, Gt, Le, Lt, MinLen
from pydantic import Discriminator

from llmtrain.config.base import Changes, NameOf, Settings


class PythonDocs(Settings):
    """The documentation that every interpreter carries: `pydoc_data.topics` and the standard library's docstrings."""

    kind: Annotated[Literal["python_docs"], Changes.DATA]


class TextFiles(Settings):
    """UTF-8 text files, one document each."""

    kind: Annotated[Literal["files"], Changes.DATA]
    paths: Annotated[tuple[str, ...], MinLen(1), Changes.SURFACE, NameOf(Changes.DATA)]
    """Files or globs (`**` allowed), relative to the working directory. The prepared data's key has their content."""
    licence: Annotated[str, Changes.DATA]
    """Licence of the text (an SPDX id, or `proprietary`): carried to the manifest and the model card."""


class JsonlText(Settings):
    """JSON lines, one document each."""

    kind: Annotated[Literal["jsonl"], Changes.DATA]
    paths: Annotated[tuple[str, ...], MinLen(1), Changes.SURFACE, NameOf(Changes.DATA)]
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
    """JSON lines of {"prompt", "chosen", "rejected"}: texts, or lists of chat messages; further fields are ignored.

    Messages are OpenAI's or ShareGPT's (whose prompt may be called `conversations`) and may stand beside a list of
    `tools`. Where `prompt` is missing, it is what the conversations `chosen` and `rejected` have in common."""

    kind: Annotated[Literal["jsonl"], Changes.DATA]
    paths: Annotated[tuple[str, ...], MinLen(1), Changes.SURFACE, NameOf(Changes.DATA)]
    """Files or globs, relative to the working directory. The prepared data's key has their content."""
    licence: Annotated[str, Changes.DATA]
    """Licence of the pairs (an SPDX id, or `proprietary`)."""
    template: Annotated[Literal["plain", "chat"], Changes.DATA]
    """`plain`: prompt, answer, end-of-text. `chat`: the prompt as the user's turn of the tokenizer's chat template;
    messages need it."""


class VoteFile(Settings):
    """JSON lines of {"prompt", "completion", "label": true or false}: answers judged one at a time, for KTO.

    `prompt` and `completion` are texts, or lists of chat messages. Pairs need no conversion: KTO takes each as a vote
    for its chosen answer and one against its rejected answer."""

    kind: Annotated[Literal["votes"], Changes.DATA]
    paths: Annotated[tuple[str, ...], MinLen(1), Changes.SURFACE, NameOf(Changes.DATA)]
    """Files or globs, relative to the working directory. The prepared data's key has their content."""
    licence: Annotated[str, Changes.DATA]
    """Licence of the votes (an SPDX id, or `proprietary`)."""
    template: Annotated[Literal["plain", "chat"], Changes.DATA]
    """`plain`: prompt, answer, end-of-text. `chat`: the tokenizer's chat template; messages need it."""


Pairs = Annotated[Continuations | PreferenceFile | VoteFile, Discriminator("kind")]


class ChatFile(Settings):
    """Chats as JSON lines, or as one JSON array of objects."""

    kind: Annotated[Literal["jsonl"], Changes.DATA]
    paths: Annotated[tuple[str, ...], MinLen(1), Changes.SURFACE, NameOf(Changes.DATA)]
    """Files or globs, relative to the working directory. The prepared data's key has their content."""
    licence: Annotated[str, Changes.DATA]
    """Licence of the chats (an SPDX id, or `proprietary`)."""
    format: Annotated[Literal["auto", "messages", "sharegpt", "pairs"], Changes.DATA]
    """`messages`: OpenAI's {"messages": [{"role", "content"}], "tools"}, where an assistant's message of `weight` 0 is
    not learnt. `sharegpt`: {"conversations": [{"from", "value"}], "system", "tools"}. `pairs`: {"prompt", "response"},
    {"instruction", "input", "output"} or {"question", "answer"}. `auto`: each record by the fields that it has."""


class DocstringChats(Settings):
    """Chats made from Python's standard library: what a function does, by its docstring, and how it is called."""

    kind: Annotated[Literal["docstring_chats"], Changes.DATA]
    max_answer_characters: Annotated[int, Gt(0), Changes.DATA]
    """Functions whose docstring begins with a longer paragraph are left out."""
    max_training_chats: Annotated[int | None, Gt(0), Changes.DATA]
    """Most chats to train on, chosen by hash; null takes all. Validation and test keep all of theirs."""


Chats = Annotated[ChatFile | DocstringChats, Discriminator("kind")]


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


class _TuningData(_Data):
    def text(self) -> TextData:
        """The same corpus as pretraining data, split the same way, so that what is held out stays held out."""
        values = {name: getattr(self, name) for name in _Data.model_fields}
        return TextData(kind="text", **values)


class PreferenceData(_TuningData):
    """Preference pairs; `corpus` trains the tokenizer, measures the held-out loss, and builds a missing base model."""

    kind: Annotated[Literal["preferences"], Changes.DATA]
    pairs: Pairs


class ChatData(_TuningData):
    """Chats; `corpus` trains the tokenizer, measures the held-out loss, and builds a missing base model."""

    kind: Annotated[Literal["chat"], Changes.DATA]
    chats: Chats


Data = Annotated[TextData | PreferenceData | ChatData, Discriminator("kind")]
