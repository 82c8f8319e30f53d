"""Preference pairs, prepared once and kept under `outputs` by what they are made of."""

import hashlib
import json
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from llmtrain.artifacts import DatasetManifest
from llmtrain.config.base import Changes, content_hash
from llmtrain.config.data import Continuations, PreferenceData, PreferenceFile, VoteFile
from llmtrain.data.chat_template import ChatTemplate
from llmtrain.data.continuations import Passage, continuation_pairs, sample
from llmtrain.data.corpus import fingerprint
from llmtrain.data.input_files import Refused
from llmtrain.data.messages import BadMessage, shown, texts_in
from llmtrain.data.once import make_once
from llmtrain.data.pair_ids import Form, pair_ids, rendered_pair
from llmtrain.data.preference_files import ChatPair, prompt_of, read_pairs, read_votes
from llmtrain.data.preferences import Pair, PairText, PairWriter
from llmtrain.data.prepared import key_of, read_manifest, verify, write_manifest
from llmtrain.data.refusals import check_refused_share
from llmtrain.data.splits import SPLITS, split_of
from llmtrain.data.text import TokenShards, smallest_dtype
from llmtrain.data.tokenizer import decode_text, load_tokenizer, special_token_in
from llmtrain.data.votes import answers_to_others
from llmtrain.errors import DataError

PAIRS_AT_ONCE = 1000
Labels = dict[str, bool]
"""Whether a vote is for its answer, by file:line; empty where there are pairs."""


def prepare_preferences(
    data: PreferenceData,
    text: DatasetManifest,
    tokenizer_dir: Path,
    outputs: Path,
    say: Callable[[str], None],
    max_tokens: int,
) -> DatasetManifest:
    """The pairs as ids under `outputs/data`, for `PreferencePairs`.

    `text` is `data.text()` prepared with the same tokenizer: continuations are cut from its splits. The pairs of a file
    are split by the hash of their prompt, or of the first user's message. A pair whose prompt and longer answer have
    more than `max_tokens` is refused. Votes are kept as `preferences` says.
    Raises DataError for too many refused pairs, for a split that stays empty and for chats where the tokenizer has no
    template, and as `read_pairs` and `continuation_pairs` do.
    """
    tokenizer_hash = (tokenizer_dir / "sha256").read_text()
    assert text.tokenizer_sha256 == tokenizer_hash, "text and pairs share one tokenizer"
    match data.pairs:
        case PreferenceFile():
            form: Form = data.pairs.template
            made_of = fingerprint(data.pairs)
            parents: tuple[str, ...] = ()
            sources = {"preference files": data.pairs.licence}
        case VoteFile():
            form = data.pairs.template
            made_of = fingerprint(data.pairs)
            parents = ()
            sources = {"vote files": data.pairs.licence}
        case Continuations():
            form = "continuation"
            made_of = text.content_sha256
            parents = (text.sha256,)
            sources = text.sources
    key = key_of("preferences", data.fields_that_change(Changes.DATA), made_of, tokenizer_hash, max_tokens)
    target = outputs / "data" / key

    def make(directory: Path) -> None:
        tokenizer = load_tokenizer(tokenizer_dir)
        if form == "chat" and tokenizer.chat_template is None:
            raise DataError(
                "data.pairs.template=chat, but the tokenizer has no chat template; set data.pairs.template=plain, "
                "or choose another model.tokenizer"
            )
        verify(text, outputs)
        pairs, labels, refused, num_duplicates = _pairs_by_split(data, outputs / text.path, tokenizer)
        content = hashlib.sha256()
        counts = {}
        for split in SPLITS:
            writer = PairWriter(directory, split, smallest_dtype(len(tokenizer)))
            kept: list[tuple[Pair, PairText]] = []
            for pair in _tokenised(tokenizer, pairs[split], form, max_tokens):
                if isinstance(pair, Refused):
                    refused.append(pair)
                else:
                    kept.append(pair)
            for ids, said in _with_answers_to_others(kept, max_tokens) if labels else kept:
                label = labels.get(said.where)
                writer.append(ids, said, label)
                identity = [split, said.prompt, said.chosen, said.rejected]
                content.update(content_hash(identity if label is None else [*identity, label]).encode())
            counts[split] = writer.close()
        num_pairs = sum(count.num_documents for count in counts.values())
        num_records = num_pairs + len(refused) + num_duplicates
        check_refused_share(refused, num_records, data.max_refused_share, target.with_name(f"{key}.refused.jsonl"))
        if empty := [split for split, count in counts.items() if not count.num_documents]:
            raise DataError(
                f"data.pairs has {num_pairs} pairs, and none of them falls into {' and '.join(empty)}; add pairs with "
                f"other prompts, or raise data.validation_share and data.test_share"
            )
        write_manifest(
            directory,
            path=target.relative_to(outputs),
            kind="preferences",
            parents=parents,
            tokenizer_sha256=tokenizer_hash,
            content_sha256=content_hash([content.hexdigest(), form, sources, tokenizer_hash]),
            splits=counts,
            sources=sources,
            num_duplicates=num_duplicates,
            refused=refused,
        )
        numbers = ", ".join(f"{split} {count.num_documents:,}" for split, count in counts.items())
        what = "votes" if labels else "preference pairs"
        say(f"prepared {num_pairs:,} {what}: {numbers}; {len(refused)} refused, {num_duplicates} duplicates")

    make_once(target, make, say)
    return read_manifest(target)


def _pairs_by_split(
    data: PreferenceData, text_dir: Path, tokenizer: Any
) -> tuple[dict[str, list[PairText | ChatPair]], Labels, list[Refused], int]:
    pairs: dict[str, list[PairText | ChatPair]] = {split: [] for split in SPLITS}
    labels: Labels = {}
    match data.pairs:
        case PreferenceFile() | VoteFile() as files:
            if isinstance(files, VoteFile):
                votes, refused, num_duplicates = read_votes(files)
                labels = {vote.pair.where: vote.is_desirable for vote in votes}
                kept = [vote.pair for vote in votes]
            else:
                kept, refused, num_duplicates = read_pairs(files)
            for pair in kept:
                split = split_of(prompt_of(pair), data.split_seed, data.validation_share, data.test_share)
                pairs[split].append(pair)
            return pairs, labels, refused, num_duplicates
        case Continuations() as settings:
            refused = []
            for split in SPLITS:
                documents = _passages(text_dir, split, tokenizer)
                made: list[PairText] = []
                for record in continuation_pairs(
                    split, documents, settings.prompt_characters, settings.answer_characters, data.split_seed
                ):
                    if isinstance(record, Refused):
                        refused.append(record)
                    else:
                        made.append(record)
                if split == "train" and settings.max_training_pairs is not None:
                    made = sample(made, settings.max_training_pairs, data.split_seed)
                pairs[split] += made
            return pairs, labels, refused, 0


def _passages(text_dir: Path, split: str, tokenizer: Any) -> list[Passage]:
    """A split's documents, as the tokenizer gives them back."""
    shards = TokenShards(text_dir, split)
    with (text_dir / "documents.jsonl").open() as listing:
        names = [facts["name"] for facts in map(json.loads, listing) if facts["split"] == split]
    texts = [decode_text(tokenizer, shards.document(index)[:-1].tolist()) for index in range(shards.num_documents)]
    return [Passage(name, text) for name, text in zip(names, texts, strict=True)]


def _tokenised(
    tokenizer: Any, texts: list[PairText | ChatPair], form: Form, max_tokens: int
) -> Iterator[tuple[Pair, PairText] | Refused]:
    template = ChatTemplate(tokenizer) if form == "chat" else None
    remaining = iter(texts)
    while batch := list(islice(remaining, PAIRS_AT_ONCE)):
        faults = [_fault(template, text) if template else None for text in batch]
        good = [text for text, fault in zip(batch, faults, strict=True) if fault is None]
        yield from (Refused(text.where, fault) for text, fault in zip(batch, faults, strict=True) if fault is not None)
        for text, pair in zip(good, pair_ids(tokenizer, good, form), strict=True):
            num_tokens = len(pair.prompt_ids) + max(len(pair.chosen_ids), len(pair.rejected_ids))
            if not len(pair.prompt_ids):
                yield Refused(text.where, "no token of the prompt stays the same when an answer follows")
            elif num_tokens > max_tokens:
                yield Refused(text.where, f"has {num_tokens} tokens, more than trainer.sequence_tokens={max_tokens}")
            else:
                yield pair, _as_text(text, template)


def _fault(template: ChatTemplate, pair: PairText | ChatPair) -> str | None:
    """Why the chat template cannot render a pair faithfully, or None where it can."""
    parts = [pair.prompt, pair.chosen, pair.rejected, pair.tools if isinstance(pair, ChatPair) else None]
    if token := special_token_in(template.tokenizer, texts_in(parts)):
        return f"spells the special token {token}, which would end a turn of the chat"
    try:
        rendered_pair(template, pair)
    except BadMessage as fault:
        return str(fault)
    return None


def _as_text(pair: PairText | ChatPair, template: ChatTemplate | None) -> PairText:
    """For people: messages as the template writes the prompt, and what the answers say."""
    if isinstance(pair, PairText):
        return pair
    assert template is not None, "messages need a chat template"
    prompt = template.text(pair.prompt, pair.tools, add_generation_prompt=True)
    return PairText(prompt, shown(pair.chosen), shown(pair.rejected), pair.where)


def _with_answers_to_others(votes: list[tuple[Pair, PairText]], max_tokens: int) -> Iterator[tuple[Pair, PairText]]:
    """Votes with the answer to another prompt in the place of the rejected one, cut to what fits behind the prompt."""
    others = answers_to_others([text.prompt for _, text in votes]) if votes else []
    for (pair, text), other in zip(votes, others, strict=True):
        answer, said = votes[other][0].chosen_ids, votes[other][1].chosen
        cut = answer[: max_tokens - len(pair.prompt_ids)]
        yield Pair(pair.prompt_ids, pair.chosen_ids, cut), PairText(text.prompt, text.chosen, said, text.where)
