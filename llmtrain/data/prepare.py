"""Tokenizer and text, each prepared once and kept under `outputs` by what it is made of."""

import hashlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from llmtrain.artifacts import DatasetManifest
from llmtrain.config.base import Changes, content_hash
from llmtrain.config.data import TextData
from llmtrain.config.model import Characters, HFTokenizer, Tokenizer, TrainedBPE
from llmtrain.data.corpus import Document, fingerprint
from llmtrain.data.once import is_only_looking, make_once
from llmtrain.data.prepared import json_line, key_of, read_manifest, write_manifest
from llmtrain.data.splits import SPLITS, SplitCorpus, text_digest
from llmtrain.data.text import ShardWriter, smallest_dtype
from llmtrain.data.tokenizer import collect_characters, encode_texts, load_tokenizer, tokenizer_sha256, train_bpe
from llmtrain.errors import IntegrityError, TokenizerMismatch, UserError
from llmtrain.files import sha256_of

SAY_EVERY_S = 5
CHARACTERS_AT_ONCE = 1_000_000
TOKENIZER_FILES = ("*.json", "*.jinja", "*.txt", "*.model")


def prepare_tokenizer(tokenizer: Tokenizer, data: TextData, outputs: Path, say: Callable[[str], None]) -> Path:
    """The directory, under `outputs/tokenizers`, of the tokenizer that the config asks for.

    The file `sha256` in it has its `tokenizer_sha256`. A BPE and characters see the training split only. Raises
    DataError as `SplitCorpus` and `load_tokenizer` do.
    """
    match tokenizer:
        case TrainedBPE():
            key = key_of("bpe", tokenizer.vocab_size, data.fields_that_change(Changes.DATA), fingerprint(data.corpus))
        case Characters():
            key = key_of("characters", data.fields_that_change(Changes.DATA), fingerprint(data.corpus))
        case HFTokenizer() if (directory := Path(tokenizer.path).expanduser()).is_dir():
            files = sorted(path for pattern in TOKENIZER_FILES for path in directory.glob(pattern))
            key = key_of("hf", [[path.name, sha256_of(path)] for path in files])
        case HFTokenizer():
            key = key_of("hf", tokenizer_sha256(load_tokenizer(tokenizer.path, fetch=not is_only_looking())))
    target = outputs / "tokenizers" / key

    def training_texts() -> Iterator[str]:
        corpus = SplitCorpus(data, target.with_name(f"{key}.refused.jsonl"), say)
        return (document.text for split, document in corpus if split == "train")

    def make(directory: Path) -> None:
        match tokenizer:
            case TrainedBPE():
                say(f"training a byte-level BPE of {tokenizer.vocab_size} entries")
                train_bpe(training_texts(), tokenizer.vocab_size, directory)
            case Characters():
                collect_characters(training_texts(), directory)
            case HFTokenizer():
                load_tokenizer(tokenizer.path).save_pretrained(directory)
        (directory / "sha256").write_text(tokenizer_sha256(load_tokenizer(directory)))

    make_once(target, make, say)
    return target


def load_prepared_tokenizer(directory: Path) -> Any:
    """What `prepare_tokenizer` wrote; raises IntegrityError where it has changed since."""
    try:
        tokenizer = load_tokenizer(directory)
        if tokenizer_sha256(tokenizer).encode() != (directory / "sha256").read_bytes():
            raise TokenizerMismatch("it is another tokenizer")
    except (UserError, OSError) as error:
        raise IntegrityError(
            f"{directory} has changed since it was written: {error}; delete it and run the same command again: it is "
            f"made anew"
        ) from error
    return tokenizer


def prepare_text(data: TextData, tokenizer_dir: Path, outputs: Path, say: Callable[[str], None]) -> DatasetManifest:
    """The corpus as tokens under `outputs/data`, for `TokenShards`.

    `tokenizer_dir` is what `prepare_tokenizer` returned. Documents keep the corpus's order; each one's tokens are
    followed by one end-of-text token. `documents.jsonl` says what each is, `refused.jsonl` what was left out and why.
    Raises DataError as `SplitCorpus` does.
    """
    tokenizer_hash = (tokenizer_dir / "sha256").read_text()
    key = key_of("text", data.fields_that_change(Changes.DATA), fingerprint(data.corpus), tokenizer_hash)
    target = outputs / "data" / key

    def make(directory: Path) -> None:
        tokenizer = load_tokenizer(tokenizer_dir)
        dtype = smallest_dtype(len(tokenizer))
        writers = {split: ShardWriter(directory, split, dtype, data.shard_tokens) for split in SPLITS}
        content = hashlib.sha256()
        sources: dict[str, str] = {}
        corpus = SplitCorpus(data, target.with_name(f"{key}.refused.jsonl"), say)
        said_at = time.monotonic()
        with (directory / "documents.jsonl").open("w") as listing:
            for batch in _batches(corpus):
                texts = [document.text for _, document in batch]
                for (split, document), ids in zip(batch, encode_texts(tokenizer, texts), strict=True):
                    num_bytes = len(document.text.encode())
                    writers[split].append([*ids, tokenizer.eos_token_id], num_bytes)
                    sources[document.source] = document.licence
                    identity = {
                        "sha256": text_digest(document.text).hex(),
                        "split": split,
                        "source": document.source,
                        "licence": document.licence,
                    }
                    content.update(content_hash(identity).encode())
                    size = {"tokens": len(ids) + 1, "bytes": num_bytes}
                    listing.write(json_line({"name": document.name, **identity, **size}))
                if time.monotonic() - said_at > SAY_EVERY_S:
                    said_at = time.monotonic()
                    say(f"tokenised {sum(writer.num_bytes for writer in writers.values()):,} bytes of text")
        splits = {split: writer.close() for split, writer in writers.items()}
        write_manifest(
            directory,
            path=target.relative_to(outputs),
            kind="text",
            parents=(),
            tokenizer_sha256=tokenizer_hash,
            content_sha256=content_hash([content.hexdigest(), tokenizer_hash]),
            splits=splits,
            sources=sources,
            num_duplicates=corpus.num_duplicates,
            refused=corpus.refused,
        )
        tokens = ", ".join(f"{split} {counts.num_tokens:,}" for split, counts in splits.items())
        say(f"prepared {sum(counts.num_documents for counts in splits.values()):,} documents; tokens: {tokens}")

    make_once(target, make, say)
    return read_manifest(target)


def _batches(corpus: SplitCorpus) -> Iterator[list[tuple[str, Document]]]:
    """Documents, in order, of about CHARACTERS_AT_ONCE together."""
    batch: list[tuple[str, Document]] = []
    characters = 0
    for split, document in corpus:
        batch.append((split, document))
        characters += len(document.text)
        if characters >= CHARACTERS_AT_ONCE:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch
