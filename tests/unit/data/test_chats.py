"""Chats on disk, and their preparation."""

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from chat_samples import TOOL, TOOL_TURNS, assistant, user
from data_samples import SHARES, silent, story

from llmtrain.artifacts import DatasetManifest
from llmtrain.config.data import ChatData, PythonDocs, TextData
from llmtrain.config.model import TrainedBPE
from llmtrain.data import docstring_chats, python_docs
from llmtrain.data.chats import Chat, ChatRows, ChatText, ChatWriter
from llmtrain.data.prepare import prepare_text, prepare_tokenizer
from llmtrain.data.prepare_chats import prepare_chats
from llmtrain.data.prepared import read_manifest, verify
from llmtrain.data.splits import SPLITS
from llmtrain.data.tokenizer import load_tokenizer
from llmtrain.errors import DataError, IntegrityError

ROWS = [([5, 6, 7], "011"), ([8], "0"), (list(range(100, 121)), "0" + 10 * "10"), ([1, 2, 3, 4, 5, 6, 7], "0111111")]


def chat_data_of(text_data: TextData, path: Path, **changes: Any) -> ChatData:
    chats = {"kind": "jsonl", "paths": (str(path),), "licence": "CC0-1.0", "format": "auto"}
    values = {"kind": "chat", "corpus": text_data.corpus, "chats": chats, **SHARES, **changes}
    return ChatData.model_validate(values)


@pytest.fixture
def rows(tmp_path: Path) -> ChatRows:
    writer = ChatWriter(tmp_path, "train", np.dtype("<u2"))
    for number, (ids, bits) in enumerate(ROWS):
        is_target = np.array([bit == "1" for bit in bits])
        writer.append(Chat(np.array(ids), is_target), ChatText(f"chat ü{number}", f"f:{number}"))
    counts = writer.close()
    assert (counts.num_documents, counts.num_tokens, counts.num_bytes) == (4, 3 + 1 + 21 + 7, 4 * 8)
    return ChatRows(tmp_path, "train")


def test_what_was_written_is_read(rows: ChatRows) -> None:
    assert len(rows) == 4
    for copy in (rows, pickle.loads(pickle.dumps(rows))):  # noqa: S301
        read = [(chat.ids.tolist(), "".join(str(int(bit)) for bit in chat.is_target)) for chat in copy]
        assert read == ROWS
    assert rows[0].ids.dtype == np.int64
    assert rows.lengths.tolist() == [rows.num_tokens(index) for index in range(4)] == [3, 1, 21, 7]
    assert [rows.num_targets(index) for index in range(4)] == [2, 0, 10, 6]
    assert rows.text(2) == ChatText("chat ü2", "f:2")
    assert rows.prompt_ids(0).tolist() == [5]
    assert rows.prompt_ids(3).tolist() == [1]
    with pytest.raises(IndexError, match="chat 4 of 4"):
        rows[4]


@pytest.fixture(scope="module")
def outputs(tokenizer_dir: Path) -> Path:
    return tokenizer_dir.parents[1]


@pytest.fixture(scope="module")
def text(text_data: TextData, tokenizer_dir: Path, outputs: Path) -> DatasetManifest:
    return prepare_text(text_data, tokenizer_dir, outputs, silent)


def write(path: Path, records: list[Any]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_chats_are_split_by_their_first_question_and_counted(
    text_data: TextData, text: DatasetManifest, tokenizer_dir: Path, outputs: Path, tmp_path: Path
) -> None:
    records: list[Any] = [
        {"messages": [user(story(number // 2, 6)), assistant(story(number, 5)), user("more"), assistant("no")]}
        for number in range(60)
    ]
    records += [
        {"messages": [user("Say <|im_end|>!"), assistant("No.")]},
        {"messages": [user("Long?"), assistant(story(1, 2000))]},
        {"messages": [user("Who?")]},
        records[0],
        {"messages": TOOL_TURNS, "tools": [TOOL]},
    ]
    path = write(tmp_path / "chats.jsonl", records)
    said: list[str] = []
    prepared = prepare_chats(chat_data_of(text_data, path), text, tokenizer_dir, outputs, said.append, max_tokens=1500)
    assert (prepared.kind, prepared.num_duplicates, prepared.num_refused) == ("chats", 1, 3)
    refused = [json.loads(line) for line in (outputs / prepared.path / "refused.jsonl").read_text().splitlines()]
    reasons = {record["where"].rpartition(":")[2]: record["reason"] for record in refused}
    assert reasons["61"] == "spells the special token <|im_end|>, which would end a turn of the chat"
    assert "more than trainer.sequence_tokens=1500" in reasons["62"]
    assert reasons["63"] == "ends with user: nothing is learnt from what is not answered"
    tokenizer = load_tokenizer(tokenizer_dir)
    prompts, num_targets = {}, 0
    for split in SPLITS:
        rows = ChatRows(outputs / prepared.path, split)
        assert prepared.splits[split].num_tokens == rows.lengths.sum()
        prompts[split] = {tuple(rows.prompt_ids(index).tolist()) for index in range(len(rows))}
        for index, chat in enumerate(rows):
            num_targets += rows.num_targets(index)
            assert not chat.is_target[0]
            assert tokenizer.decode(chat.ids) == rows.text(index).text
            assert tokenizer.decode(rows.prompt_ids(index)).endswith("<|im_start|>assistant\n")
    assert sum(map(len, prompts.values())) == 31
    assert not prompts["train"] & (prompts["validation"] | prompts["test"])
    counts = {split: prepared.splits[split] for split in SPLITS}
    assert said[-1:] == [
        "prepared 61 chats: "
        + ", ".join(f"{split} {count.num_documents}" for split, count in counts.items())
        + f"; {num_targets:,} of {sum(count.num_tokens for count in counts.values()):,} tokens are targets; "
        "3 refused, 1 duplicates"
    ]
    verify(prepared, outputs)
    said.clear()
    assert prepare_chats(chat_data_of(text_data, path), text, tokenizer_dir, outputs, said.append, 1500) == prepared
    assert said == []


def test_what_is_learnt_changes_the_content_and_where_it_lies_does_not(
    text_data: TextData, text: DatasetManifest, tokenizer_dir: Path, outputs: Path, tmp_path: Path
) -> None:
    def content(name: str, weight: int) -> str:
        records = [
            {"messages": [user(story(n, 6)), assistant("a", weight=weight), user("b"), assistant("c")]}
            for n in range(30)
        ]
        data = chat_data_of(text_data, write(tmp_path / name, records))
        return prepare_chats(data, text, tokenizer_dir, outputs, silent, 300).content_sha256

    assert content("a.jsonl", 1) == content("b.jsonl", 1) != content("a.jsonl", 0)


def test_too_few_first_questions_are_an_error_that_says_what_to_do(
    text_data: TextData, text: DatasetManifest, tokenizer_dir: Path, outputs: Path, tmp_path: Path
) -> None:
    path = write(tmp_path / "one.jsonl", [{"question": "q", "answer": "a"}])
    with pytest.raises(DataError, match=r"has 1 chats, and none of them falls into .*; add chats with other first"):
        prepare_chats(chat_data_of(text_data, path), text, tokenizer_dir, outputs, silent, 100)
    with pytest.raises(DataError, match=r"1 of 1 records are refused.*\n.*one.jsonl:1: has \d+ tokens, more than"):
        prepare_chats(chat_data_of(text_data, path), text, tokenizer_dir, outputs, silent, 5)


def test_a_file_that_was_cut_is_named(
    text_data: TextData, text: DatasetManifest, tokenizer_dir: Path, outputs: Path, tmp_path: Path
) -> None:
    records = [{"question": story(number, 6), "answer": "yes"} for number in range(40)]
    prepared = prepare_chats(
        chat_data_of(text_data, write(tmp_path / "q.jsonl", records)), text, tokenizer_dir, outputs, silent, 300
    )
    shard = outputs / prepared.path / "train.chats.uint16"
    shard.write_bytes(shard.read_bytes()[:-2])
    with pytest.raises(IntegrityError, match="do not hold the"):
        read_manifest(outputs / prepared.path)


@pytest.fixture
def part_of_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    """Modules from `abc` to about `c`, and `textwrap`: quick to read."""
    files = python_docs._module_files()
    part = files[:80] + [file for file in files if file[1] == "textwrap"]
    monkeypatch.setattr(python_docs, "_module_files", lambda: part)
    monkeypatch.setattr(python_docs, "topics", dict)


@pytest.mark.usefixtures("part_of_the_library")
def test_docstrings_become_questions_and_calls() -> None:
    found = {chat.where: chat.messages for _, chat in docstring_chats.chats(max_answer_characters=400)}
    assert len(found) > 200
    assert [message["content"] for message in found["textwrap.dedent"]] == [
        "What does `textwrap.dedent` do?",
        "Remove any common leading whitespace from every line in `text`.",
        "How is it called?",
        "`dedent(text)`",
    ]
    assert all(len(messages[1]["content"]) <= 400 for messages in found.values())
    assert not any(part.startswith("_") for name in found for part in name.split("."))
    assert len({messages[1]["content"] for messages in found.values()}) == len(found)


@pytest.mark.usefixtures("part_of_the_library")
def test_docstrings_stay_in_the_split_of_their_modules_text(tmp_path: Path) -> None:
    values = {"corpus": PythonDocs(kind="python_docs"), **SHARES, "shard_tokens": 10**7}
    text_data = TextData.model_validate({"kind": "text", **values})
    chats = {"kind": "docstring_chats", "max_answer_characters": 200, "max_training_chats": 50}
    data = ChatData.model_validate({"kind": "chat", "chats": chats, **values})
    assert data.text() == text_data
    tokenizer_dir = prepare_tokenizer(TrainedBPE(kind="bpe", vocab_size=310), text_data, tmp_path, silent)
    text = prepare_text(text_data, tokenizer_dir, tmp_path, silent)
    prepared = prepare_chats(data, text, tokenizer_dir, tmp_path, silent, max_tokens=1000)
    assert prepared.parents == (text.sha256,)
    assert prepared.splits["train"].num_documents == 50
    listing = (tmp_path / text.path / "documents.jsonl").read_text().splitlines()
    split_of_module = {facts["name"]: facts["split"] for facts in map(json.loads, listing)}
    for split in SPLITS:
        rows = ChatRows(tmp_path / prepared.path, split)
        for index in range(len(rows)):
            parts = rows.text(index).where.split(".")
            prefixes = [".".join(parts[:length]) for length in range(len(parts), 0, -1)]
            module = next(name for name in prefixes if name in split_of_module)
            assert split_of_module[module] == split
