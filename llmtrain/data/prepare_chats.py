"""Chats, prepared once and kept under `outputs` by what they are made of."""

import hashlib
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

from llmtrain.artifacts import DatasetManifest
from llmtrain.config.base import Changes, content_hash
from llmtrain.config.data import ChatData, ChatFile, DocstringChats, PythonDocs
from llmtrain.data import docstring_chats, python_docs
from llmtrain.data.chat_files import read_chats
from llmtrain.data.chat_template import ChatTemplate, Rendered
from llmtrain.data.chats import Chat, ChatText, ChatWriter, chat_ids
from llmtrain.data.corpus import fingerprint
from llmtrain.data.input_files import Refused
from llmtrain.data.messages import BadMessage, Conversation, texts_in
from llmtrain.data.once import make_once
from llmtrain.data.prepared import key_of, read_manifest, verify, write_manifest
from llmtrain.data.refusals import check_refused_share
from llmtrain.data.splits import SPLITS, split_of
from llmtrain.data.text import smallest_dtype
from llmtrain.data.tokenizer import load_tokenizer, special_token_in
from llmtrain.errors import DataError

CHATS_AT_ONCE = 1000
SAY_EVERY_S = 5


def prepare_chats(
    data: ChatData,
    text: DatasetManifest,
    tokenizer_dir: Path,
    outputs: Path,
    say: Callable[[str], None],
    max_tokens: int,
) -> DatasetManifest:
    """The chats as ids and targets under `outputs/data`, for `ChatRows`.

    `text` is `data.text()` prepared with the same tokenizer: chats made of docstrings fall into the split of their
    module's text. The chats of a file are split by the hash of the first user's message. A chat of more than
    `max_tokens` is refused. Raises DataError for too many refused chats, for a split that stays empty and for a
    tokenizer without a chat template, and as `read_chats` does.
    """
    tokenizer_hash = (tokenizer_dir / "sha256").read_text()
    assert text.tokenizer_sha256 == tokenizer_hash, "text and chats share one tokenizer"
    match data.chats:
        case ChatFile():
            made_of = [fingerprint(data.chats)]
            parents: tuple[str, ...] = ()
            sources = {"chat files": data.chats.licence}
        case DocstringChats():
            made_of = [fingerprint(PythonDocs(kind="python_docs")), text.content_sha256]
            parents = (text.sha256,)
            sources = {python_docs.SOURCE: python_docs.LICENCE}
    key = key_of("chats", data.fields_that_change(Changes.DATA), made_of, tokenizer_hash, max_tokens)
    target = outputs / "data" / key

    def make(directory: Path) -> None:
        tokenizer = load_tokenizer(tokenizer_dir)
        template = ChatTemplate(tokenizer)
        verify(text, outputs)
        chats, refused, num_duplicates = _chats_by_split(data, outputs / text.path)
        content = hashlib.sha256()
        counts, num_targets, said_at = {}, 0, time.monotonic()
        for split in SPLITS:
            writer = ChatWriter(directory, split, smallest_dtype(len(tokenizer)))
            for chat in _tokenised(template, chats[split], max_tokens):
                if time.monotonic() - said_at > SAY_EVERY_S:
                    said_at = time.monotonic()
                    say(f"tokenised {len(writer.num_targets):,} of {len(chats[split]):,} chats of the {split} split")
                if isinstance(chat, Refused):
                    refused.append(chat)
                else:
                    tokens, rendered, where = chat
                    writer.append(tokens, ChatText(rendered.text, where))
                    content.update(content_hash([split, rendered.text, rendered.spans]).encode())
            counts[split] = writer.close()
            num_targets += sum(writer.num_targets)
        num_chats = sum(count.num_documents for count in counts.values())
        num_records = num_chats + len(refused) + num_duplicates
        check_refused_share(refused, num_records, data.max_refused_share, target.with_name(f"{key}.refused.jsonl"))
        if empty := [split for split, count in counts.items() if not count.num_documents]:
            raise DataError(
                f"data.chats has {num_chats} chats, and none of them falls into {' and '.join(empty)}; add chats with "
                f"other first messages, or raise data.validation_share and data.test_share"
            )
        write_manifest(
            directory,
            path=target.relative_to(outputs),
            kind="chats",
            parents=parents,
            tokenizer_sha256=tokenizer_hash,
            content_sha256=content_hash([content.hexdigest(), sources, tokenizer_hash]),
            splits=counts,
            sources=sources,
            num_duplicates=num_duplicates,
            refused=refused,
        )
        num_tokens = sum(count.num_tokens for count in counts.values())
        shown = ", ".join(f"{split} {count.num_documents:,}" for split, count in counts.items())
        say(
            f"prepared {num_chats:,} chats: {shown}; {num_targets:,} of {num_tokens:,} tokens are targets; "
            f"{len(refused)} refused, {num_duplicates} duplicates"
        )

    make_once(target, make, say)
    return read_manifest(target)


def _chats_by_split(data: ChatData, text_dir: Path) -> tuple[dict[str, list[Conversation]], list[Refused], int]:
    chats: dict[str, list[Conversation]] = {split: [] for split in SPLITS}
    match data.chats:
        case ChatFile():
            kept, refused, num_duplicates = read_chats(data.chats)
            for chat in kept:
                split = split_of(chat.first_prompt, data.split_seed, data.validation_share, data.test_share)
                chats[split].append(chat)
            return chats, refused, num_duplicates
        case DocstringChats() as settings:
            split_of_module = docstring_chats.splits_of_modules(text_dir)
            for module, chat in docstring_chats.chats(settings.max_answer_characters):
                split = split_of_module.get(module) or split_of(
                    module, data.split_seed, data.validation_share, data.test_share
                )
                chats[split].append(chat)
            if settings.max_training_chats is not None:
                chats["train"] = docstring_chats.sample(chats["train"], settings.max_training_chats, data.split_seed)
            return chats, [], 0


def _tokenised(
    template: ChatTemplate, chats: list[Conversation], max_tokens: int
) -> Iterator[tuple[Chat, Rendered, str] | Refused]:
    remaining = iter(chats)
    while batch := list(islice(remaining, CHATS_AT_ONCE)):
        rendered: list[tuple[Rendered, str]] = []
        for chat in batch:
            if token := special_token_in(template.tokenizer, texts_in([chat.messages, chat.tools])):
                yield Refused(chat.where, f"spells the special token {token}, which would end a turn of the chat")
                continue
            try:
                rendered.append((template.rendered(chat), chat.where))
            except BadMessage as fault:
                yield Refused(chat.where, str(fault))
        for (whole, where), tokens in zip(rendered, chat_ids(template, [one for one, _ in rendered]), strict=True):
            if len(tokens.ids) > max_tokens:
                yield Refused(where, f"has {len(tokens.ids)} tokens, more than trainer.sequence_tokens={max_tokens}")
            elif not tokens.is_target.any():
                yield Refused(where, "has no token to learn: the chat template writes nothing of the answers")
            else:
                yield tokens, whole, where
