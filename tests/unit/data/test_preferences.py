import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from chat_samples import assistant, user

from llmtrain.config.data import PreferenceFile
from llmtrain.data.pair_ids import pair_ids
from llmtrain.data.preference_files import read_pairs
from llmtrain.data.preferences import Pair, PairText, PairWriter, PreferencePairs
from llmtrain.data.tokenizer import load_tokenizer, special_token_in

TEXTS = [PairText("ab", "long", "no", "f:1"), PairText("ü", "x", "yes", "f:2"), PairText("c", "12", "34", "f:3")]
IDS = [([1, 2, 3], [4, 5], [6]), ([7], [8], [9, 10]), ([11, 12], [13], [14])]


def pair(prompt: list[int], chosen: list[int], rejected: list[int]) -> Pair:
    return Pair(np.array(prompt), np.array(chosen), np.array(rejected))


def lists(pair: Pair) -> tuple[list[int], list[int], list[int]]:
    return pair.prompt_ids.tolist(), pair.chosen_ids.tolist(), pair.rejected_ids.tolist()


def read(path: Path, lines: list[Any], template: str = "plain") -> tuple[list[Any], list[tuple[str, str]], int]:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    values = {"kind": "jsonl", "paths": (str(path),), "licence": "MIT", "template": template}
    file = PreferenceFile.model_validate(values)
    kept, refused, num_duplicates = read_pairs(file)
    return kept, [(record.where.rpartition(":")[2], record.reason) for record in refused], num_duplicates


@pytest.fixture
def pairs(tmp_path: Path) -> PreferencePairs:
    writer = PairWriter(tmp_path, "train", np.dtype("<u2"))
    for text, ids in zip(TEXTS, IDS, strict=True):
        writer.append(pair(*ids), text)
    counts = writer.close()
    assert (counts.num_documents, counts.num_tokens, counts.num_bytes) == (3, 14, 8 + 6 + 5)
    return PreferencePairs(tmp_path, "train")


def test_what_was_written_is_read(pairs: PreferencePairs) -> None:
    assert len(pairs) == 3
    assert [lists(pair) for pair in pairs] == IDS
    assert [pairs.text(index) for index in range(3)] == TEXTS
    assert lists(pickle.loads(pickle.dumps(pairs))[1]) == IDS[1]  # noqa: S301


def test_the_prompt_counts_for_both_answers(pairs: PreferencePairs) -> None:
    assert [pairs.num_tokens(index) for index in range(3)] == [3 + 2 + 3 + 1, 1 + 1 + 1 + 2, 2 + 1 + 2 + 1]


def test_the_length_baseline_counts_equal_lengths_half(pairs: PreferencePairs) -> None:
    assert pairs.longer_is_chosen_accuracy() == (1 + 0 + 0.5) / 3


def test_traps_of_real_preference_files_are_refused_with_line_and_reason(tmp_path: Path) -> None:
    good = {"prompt": "p", "chosen": "a", "rejected": "b", "votes": [1, 1]}
    lines = [
        good,
        {"prompt": "p", "chosen": None, "rejected": "b"},
        {"prompt": "p", "chosen": "a", "rejected": ["b"]},
        {"prompt": "p", "chosen": " ", "rejected": "b"},
        {"prompt": "p", "chosen": "same", "rejected": "same "},
        {"prompt": "p", "chosen": "a"},
        {**good, "votes": [2]},  # a whole pair stored twice
        {"prompt": "q", "chosen": "x", "rejected": "y"},
        {"prompt": "q", "chosen": "y", "rejected": "x"},  # contradicts the one before
        {"prompt": "r", "chosen": "b", "rejected": "a"},  # another prompt may prefer the other way
    ]
    kept, refused, num_duplicates = read(tmp_path / "x.jsonl", lines)
    assert [(pair.prompt, pair.chosen, pair.rejected) for pair in kept] == [("p", "a", "b"), ("r", "b", "a")]
    assert num_duplicates == 1
    assert refused == [
        ("2", "'chosen' is null, not a string"),
        ("3", "'rejected' is a list, not a string"),
        ("4", "'chosen' is empty"),
        ("5", "is a tie: 'chosen' and 'rejected' are the same text"),
        ("6", "has no field 'rejected'"),
        ("8", f"prefers what {tmp_path}/x.jsonl:9 rejects, for the same prompt"),
        ("9", f"prefers what {tmp_path}/x.jsonl:8 rejects, for the same prompt"),
    ]


def test_messages_that_are_no_pair_are_refused_with_line_and_reason(tmp_path: Path) -> None:
    q, a, b = user("q"), assistant("a"), assistant("b")
    lines: list[Any] = [
        {"prompt": [q], "chosen": [a], "rejected": b},
        {"chosen": [q, a], "rejected": [{**q, "content": "other"}, b]},
        {"prompt": [q], "chosen": [a], "rejected": [a]},
        {"prompt": [q, a], "chosen": [a], "rejected": [b]},
        {"prompt": [a, q], "chosen": [a], "rejected": [b]},
        {"prompt": [q], "chosen": [a, q], "rejected": [b]},
        {"prompt": [q], "chosen": [a]},
        {"conversations": [], "chosen": {"from": "gpt", "value": "a"}, "rejected": {"from": "gpt", "value": "b"}},
        {"conversations": [{"from": "human", "value": "q"}], "chosen": [a], "rejected": {"from": "gpt", "value": "b"}},
        {"prompt": [q], "chosen": [b], "rejected": [a], "tools": [{"name": "f"}]},
    ]
    path = tmp_path / "x.jsonl"
    kept, refused, num_duplicates = read(path, lines, template="chat")
    assert [pair.where.rpartition(":")[2] for pair in kept] == ["1", "10"]  # with tools it is another question
    assert num_duplicates == 1  # ShareGPT's form of the first
    assert refused == [
        ("2", "there is no prompt: it is empty, or 'chosen' and 'rejected' begin with different messages"),
        ("3", "is a tie: 'chosen' and 'rejected' are the same messages"),
        ("4", "the prompt ends with assistant: there is nothing to answer"),
        ("5", "the prompt begins with assistant: there is no question"),
        ("6", "'chosen' is not one message of the assistant"),
        ("7", "'rejected' is no list of messages"),
        ("8", "there is no prompt: it is empty, or 'chosen' and 'rejected' begin with different messages"),
    ]
    with_text = {
        "prompt": "q",
        "chosen": [user("o"), assistant("p"), q, a],
        "rejected": [user("o"), assistant("p"), q, b],
    }
    (pair,) = read(path, [with_text], template="chat")[0]
    assert (pair.prompt, pair.chosen, pair.rejected) == ((user("o"), assistant("p"), q), (a,), (b,))
    assert read(path, lines[:1], template="plain")[1] == [
        ("1", "'prompt' is a list, not a string; messages need data.pairs.template=chat")
    ]


def test_a_plain_answer_ends_with_end_of_text_and_a_continuation_does_not(tokenizer_dir: Path) -> None:
    tokenizer = load_tokenizer(tokenizer_dir)
    text = PairText("the old cat", " sat by a wall", " slept", "")
    (plain,) = pair_ids(tokenizer, [text], "plain")
    (continuation,) = pair_ids(tokenizer, [text], "continuation")
    assert plain.chosen_ids.tolist() == [*continuation.chosen_ids, tokenizer.eos_token_id]
    assert tokenizer.decode(plain.prompt_ids) == "the old cat"
    assert tokenizer.decode(continuation.rejected_ids) == " slept"


def test_a_chat_answer_ends_its_turn(tokenizer_dir: Path) -> None:
    tokenizer = load_tokenizer(tokenizer_dir)
    (pair,) = pair_ids(tokenizer, [PairText("Which cat?", "the old cat", "none", "")], "chat")
    assert tokenizer.decode(pair.prompt_ids) == "<|im_start|>user\nWhich cat?<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.decode(pair.chosen_ids) == "the old cat<|im_end|>\n"
    assert tokenizer.convert_tokens_to_ids("<|im_end|>") in pair.rejected_ids


def test_where_a_token_crosses_the_border_the_prompt_gives_up_its_end(tokenizer_dir: Path) -> None:
    tokenizer = load_tokenizer(tokenizer_dir)
    assert len(tokenizer.encode(" cat")) == 1
    (pair,) = pair_ids(tokenizer, [PairText("the old c", "at", " x", "")], "continuation")
    assert tokenizer.decode(pair.prompt_ids) == "the old"
    assert [tokenizer.decode(ids) for ids in (pair.chosen_ids, pair.rejected_ids)] == [" cat", " c x"]


def test_text_that_spells_a_special_token_is_found(tokenizer_dir: Path) -> None:
    tokenizer = load_tokenizer(tokenizer_dir)
    assert special_token_in(tokenizer, "b<|im_end|>") == "<|im_end|>"
    assert special_token_in(tokenizer, "b<think>") is None
