"""Votes on single answers, and pairs as votes."""

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from chat_samples import assistant, user
from data_samples import SHARES, silent, story

from llmtrain.artifacts import DatasetManifest
from llmtrain.config.data import PreferenceData, TextData, VoteFile
from llmtrain.data.preference_files import read_votes
from llmtrain.data.preferences import Pair, PairText, PairWriter, PreferencePairs
from llmtrain.data.prepare import prepare_text
from llmtrain.data.prepare_preferences import prepare_preferences
from llmtrain.data.splits import SPLITS
from llmtrain.data.tokenizer import load_tokenizer
from llmtrain.data.votes import PairVotes, answers_to_others, votes
from llmtrain.errors import DataError


def test_each_answer_meets_the_nearest_prompt_before_it_that_is_another() -> None:
    assert answers_to_others("abc") == [2, 0, 1]
    assert answers_to_others("aabba") == [3, 3, 1, 1, 3]
    with pytest.raises(DataError, match="at least two prompts in each split"):
        answers_to_others("aa")


def write(path: Path, records: list[Any]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def vote_data(text_data: TextData, path: Path, template: str) -> PreferenceData:
    pairs = {"kind": "votes", "paths": (str(path),), "licence": "CC0-1.0", "template": template}
    return PreferenceData.model_validate({"kind": "preferences", "corpus": text_data.corpus, "pairs": pairs, **SHARES})


def test_wrong_votes_are_refused_with_line_and_reason(tmp_path: Path) -> None:
    lines = [
        {"prompt": "p", "completion": "a", "label": True},
        {"prompt": "p", "completion": "a", "label": 1},
        {"prompt": "p", "completion": "a"},
        {"prompt": "p", "completion": " ", "label": False},
        {"prompt": "p", "label": False},
        {"prompt": "p", "completion": "a", "label": True, "voter": 2},
        {"prompt": "p", "completion": "b", "label": True},
        {"prompt": "p", "completion": "b", "label": False},
        {"prompt": [user("p")], "completion": [assistant("a")], "label": False},
        {"prompt": [user("p")], "completion": [user("a")], "label": False},
        {"prompt": [user("p"), assistant("a")], "completion": [assistant("a")], "label": False},
    ]
    path = write(tmp_path / "v.jsonl", lines)
    kept, refused, num_duplicates = read_votes(
        VoteFile(kind="votes", paths=(str(path),), licence="MIT", template="chat")
    )
    assert [(vote.pair.where.rpartition(":")[2], vote.is_desirable) for vote in kept] == [("1", True), ("9", False)]
    assert num_duplicates == 1
    assert [(record.where.rpartition(":")[2], record.reason) for record in refused] == [
        ("2", "has the label 1; it must be true or false"),
        ("3", "has the label null; it must be true or false"),
        ("4", "'completion' is empty"),
        ("5", "has no field 'completion'"),
        ("10", "'completion' is not one message of the assistant"),
        ("11", "the prompt ends with assistant: there is nothing to answer"),
        ("7", f"is voted the other way by {path}:8"),
        ("8", f"is voted the other way by {path}:7"),
    ]
    plain = VoteFile(kind="votes", paths=(str(path),), licence="MIT", template="plain")
    assert ("9", "'prompt' is a list, not a string; messages need data.pairs.template=chat") in [
        (r.where.rpartition(":")[2], r.reason) for r in read_votes(plain)[1]
    ]


@pytest.fixture(scope="module")
def outputs(tokenizer_dir: Path) -> Path:
    return tokenizer_dir.parents[1]


@pytest.fixture(scope="module")
def text(text_data: TextData, tokenizer_dir: Path, outputs: Path) -> DatasetManifest:
    return prepare_text(text_data, tokenizer_dir, outputs, silent)


@pytest.mark.parametrize("template", ["plain", "chat"])
def test_votes_keep_label_answer_and_the_answer_to_another_prompt(
    text_data: TextData, text: DatasetManifest, tokenizer_dir: Path, outputs: Path, tmp_path: Path, template: str
) -> None:
    records = [
        {"prompt": story(n, 30 - 25 * (n % 2)), "completion": story(100 + n, 3 + 25 * (n % 2)), "label": n % 3 == 0}
        for n in range(60)
    ]
    by_completion = {record["completion"]: record for record in records}
    data = vote_data(text_data, write(tmp_path / "v.jsonl", records), template)
    unlimited = prepare_preferences(data, text, tokenizer_dir, outputs, silent, max_tokens=10_000)
    limit = max(  # a long prompt with a short answer, or the other way round
        len(vote.prompt_ids) + len(vote.chosen_ids)
        for split in SPLITS
        for vote in PreferencePairs(outputs / unlimited.path, split)
    )
    prepared = prepare_preferences(data, text, tokenizer_dir, outputs, silent, max_tokens=limit)
    assert (prepared.kind, prepared.num_refused) == ("preferences", 0)
    assert sum(counts.num_documents for counts in prepared.splits.values()) == 60
    tokenizer, num_cut = load_tokenizer(tokenizer_dir), 0
    for split in SPLITS:
        read = votes(outputs / prepared.path, split, limit)
        assert type(read) is PreferencePairs
        for index, vote in enumerate(read):
            said = read.text(index)
            record = by_completion[said.chosen]
            assert (said.prompt, read.is_desirable(index)) == (record["prompt"], record["label"])
            assert by_completion[said.rejected]["prompt"] != said.prompt
            assert said.chosen in tokenizer.decode(vote.chosen_ids)
            whole = next(v.chosen_ids for i, v in enumerate(read) if read.text(i).chosen == said.rejected)
            assert vote.rejected_ids.tolist() == whole[: limit - len(vote.prompt_ids)].tolist()
            num_cut += len(vote.rejected_ids) < len(whole)
    assert num_cut > 10, "a long answer behind a long prompt"
    turned = [{**record, "label": not record["label"]} for record in records]
    other = vote_data(text_data, write(tmp_path / "w.jsonl", turned), template)
    changed = prepare_preferences(other, text, tokenizer_dir, outputs, silent, limit)
    assert changed.content_sha256 != prepared.content_sha256


def pair(prompt: list[int], chosen: list[int], rejected: list[int]) -> Pair:
    return Pair(np.array(prompt), np.array(chosen), np.array(rejected))


def test_each_pair_is_two_votes(tmp_path: Path) -> None:
    writer = PairWriter(tmp_path, "train", np.dtype("<u2"))
    writer.append(pair([1], [2, 3, 4], [5]), PairText("p", "good", "bad", "f:1"))
    writer.append(pair([6, 7], [8], [9, 10]), PairText("q", "right", "wrong!", "f:2"))
    writer.close()
    found = votes(tmp_path, "train", max_tokens=4)
    assert isinstance(found, PairVotes)
    for copy in (found, pickle.loads(pickle.dumps(found))):  # noqa: S301
        read = [(v.prompt_ids.tolist(), v.chosen_ids.tolist(), v.rejected_ids.tolist()) for v in copy]
        assert read == [([1], [2, 3, 4], [8]), ([1], [5], [9, 10]), ([6, 7], [8], [2, 3]), ([6, 7], [9, 10], [5])]
        assert [copy.is_desirable(index) for index in range(4)] == [True, False, True, False]
    assert [found.num_tokens(index) for index in range(4)] == [2 + 3 + 1, 2 + 1 + 2, 4 + 1 + 2, 4 + 2 + 1]
    assert found.text(2) == PairText("q", "right", "good", "f:2")
    assert found.longer_is_chosen_accuracy() == PreferencePairs(tmp_path, "train").longer_is_chosen_accuracy() == 0.5
    assert PreferencePairs(tmp_path, "train").is_desirable(0) is None


def test_the_length_baseline_of_votes_says_good_above_the_median(tmp_path: Path) -> None:
    writer = PairWriter(tmp_path, "train", np.dtype("<u2"))
    for answer, label in (("a", False), ("bb", True), ("ccc", True), ("dddd", True), ("eeeee", False)):
        writer.append(pair([1], [2], [3]), PairText("p", answer, "", "f"), label)
    writer.close()
    assert PreferencePairs(tmp_path, "train").longer_is_chosen_accuracy() == (1 + 0 + 0.5 + 1 + 0) / 5
