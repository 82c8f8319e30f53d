"""Characters as tokens: `model.tokenizer.kind=characters`."""

import json
from pathlib import Path
from typing import Any

import pytest
from data_samples import preference_data_of, silent, story, text_data_of
from transformers import AutoTokenizer

from llmtrain.config.data import TextData
from llmtrain.config.model import Characters
from llmtrain.data.prepare import prepare_text, prepare_tokenizer
from llmtrain.data.prepare_preferences import prepare_preferences
from llmtrain.data.splits import SplitCorpus
from llmtrain.data.tokenizer import collect_characters, decode_text, encode_texts, load_tokenizer, tokenizer_sha256
from llmtrain.errors import DataError

TEXT = "Grüße, 你好 😀!\r\n\t a \u00a0\u2028 e\u0301 é \x85 'll  .\n\n<|endoftext|> <think>\n"


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("characters")
    collect_characters([TEXT], directory)
    return directory


@pytest.fixture(scope="module")
def tokenizer(directory: Path) -> Any:
    return load_tokenizer(directory)


def test_ids_follow_the_code_points_and_the_two_tokens_that_are_no_character_come_last(tmp_path: Path) -> None:
    collect_characters(["b\na", "é b"], tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    assert encode_texts(tokenizer, ["\n abé", ""]) == [[0, 1, 2, 3, 4], []]
    assert (tokenizer.unk_token_id, tokenizer.eos_token_id, len(tokenizer)) == (5, 6, 7)
    assert tokenizer.pad_token_id == tokenizer.eos_token_id


def test_each_character_is_one_token_and_comes_back_as_it_was(tokenizer: Any) -> None:
    (ids,) = encode_texts(tokenizer, [TEXT])
    assert len(ids) == len(TEXT)
    assert decode_text(tokenizer, ids) == TEXT
    assert tokenizer.decode(ids, skip_special_tokens=True) == TEXT


def test_text_that_spells_a_special_token_is_text(tokenizer: Any) -> None:
    (ids,) = encode_texts(tokenizer, ["<|endoftext|>"])
    assert len(ids) == len("<|endoftext|>")
    assert tokenizer.eos_token_id not in ids


def test_a_character_that_was_not_seen_is_one_unknown_token(tokenizer: Any) -> None:
    (ids,) = encode_texts(tokenizer, ["aЖ😀"])
    assert ids[1] == tokenizer.unk_token_id
    assert decode_text(tokenizer, ids) == "a\N{REPLACEMENT CHARACTER}😀"
    assert encode_texts(tokenizer, [decode_text(tokenizer, ids)]) == [ids]


def test_a_text_may_hold_the_replacement_character_itself(tmp_path: Path) -> None:
    collect_characters(["a\N{REPLACEMENT CHARACTER}\N{GRINNING FACE}"], tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    assert encode_texts(tokenizer, ["a\N{REPLACEMENT CHARACTER}\N{GRINNING FACE}"]) == [[0, 1, 2]]
    assert len(tokenizer) == 4


def test_it_loads_with_a_qwen3_model_beside_it(tokenizer: Any, tmp_path: Path) -> None:
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"]}))
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded(TEXT, split_special_tokens=True).input_ids == encode_texts(tokenizer, [TEXT])[0]
    assert loaded.decode(loaded(TEXT).input_ids) == TEXT
    assert tokenizer_sha256(loaded) == tokenizer_sha256(tokenizer)


def test_characters_are_those_of_the_training_split_only(tmp_path: Path) -> None:
    (tmp_path / "one.txt").write_text("ab" * 300 + "c" * 200 + "d" * 200)  # shares 0.6, 0.2 and 0.2, and no newline
    data = text_data_of(f"{tmp_path}/one.txt")
    directory = prepare_tokenizer(Characters(kind="characters"), data, tmp_path, silent)
    tokenizer = load_tokenizer(directory)
    assert [tokenizer.convert_ids_to_tokens(index) for index in range(2)] == ["a", "b"]
    assert len(tokenizer) == 4
    manifest = prepare_text(data, directory, tmp_path, silent)
    assert {split: counts.num_tokens for split, counts in manifest.splits.items()} == {
        "train": 601,
        "validation": 201,
        "test": 201,
    }


def test_one_corpus_gives_a_directory_for_each_kind_of_tokenizer(text_data: TextData, tokenizer_dir: Path) -> None:
    outputs = tokenizer_dir.parents[1]
    directory = prepare_tokenizer(Characters(kind="characters"), text_data, outputs, silent)
    texts = [text.text for split, text in SplitCorpus(text_data, outputs / "r", silent) if split == "train"]
    assert directory != tokenizer_dir
    assert len(load_tokenizer(directory)) == len(set("".join(texts))) + 2


def test_chats_are_refused_because_characters_have_no_template(text_data: TextData, tmp_path: Path) -> None:
    votes = tmp_path / "votes.jsonl"
    lines = [{"prompt": story(number), "chosen": story(100 + number), "rejected": "no"} for number in range(30)]
    votes.write_text("".join(json.dumps(line) + "\n" for line in lines))
    directory = prepare_tokenizer(Characters(kind="characters"), text_data, tmp_path, silent)
    manifest = prepare_text(text_data, directory, tmp_path, silent)
    chats = preference_data_of(text_data, votes, "chat")
    with pytest.raises(DataError, match=r"no chat template; set data\.pairs\.template=plain"):
        prepare_preferences(chats, manifest, directory, tmp_path, silent, max_tokens=2000)
    plain = preference_data_of(text_data, votes, "plain")
    assert prepare_preferences(plain, manifest, directory, tmp_path, silent, max_tokens=2000).num_refused == 0
