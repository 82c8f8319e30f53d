import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from chat_samples import TOOL, TOOL_TURNS
from data_samples import story

from llmtrain.data.tokenizer import decode_text, encode_texts, load_tokenizer, tokenizer_sha256, train_bpe
from llmtrain.errors import DataError

ADDED = 9
CHATS = [
    [{"role": "user", "content": "Hi"}],
    [{"role": "system", "content": "Be short."}, {"role": "user", "content": "Hi\n there "}],
    [
        {"role": "user", "content": "2+3?"},
        {"role": "assistant", "content": "5"},
        {"role": "user", "content": "And 4+4?"},
    ],
]


@pytest.fixture(scope="module")
def ours(tokenizer_dir: Path) -> Any:
    return load_tokenizer(tokenizer_dir)


@pytest.fixture(scope="module")
def official(official_dir: Path) -> Any:
    return load_tokenizer(official_dir)


@pytest.fixture(scope="module")
def official_dir(repository: Path) -> Path:
    directory = repository.parent / "shared" / "data" / "tokenizer-qwen3"
    if not directory.exists():
        pytest.skip("needs ../shared: the official Qwen3 tokenizer")
    return directory


def test_settings_are_those_of_qwen3(tokenizer_dir: Path, official_dir: Path) -> None:
    mine, official = (json.loads((path / "tokenizer.json").read_text()) for path in (tokenizer_dir, official_dir))
    for part in ("normalizer", "pre_tokenizer", "post_processor"):
        assert mine[part] == official[part], part
    assert mine["decoder"]["type"] == official["decoder"]["type"] == "ByteLevel"  # which reads none of its settings
    for setting in official["model"].keys() - {"vocab", "merges"}:
        assert (mine["model"][setting] or None) == (official["model"][setting] or None), setting  # "" means none
    as_in_qwen3 = {token["content"]: token["special"] for token in official["added_tokens"]}
    for token in mine["added_tokens"]:
        assert token["special"] == as_in_qwen3[token["content"]]
    assert len(mine["added_tokens"]) == ADDED


def test_the_template_writes_what_qwen3s_writes(ours: Any, official: Any) -> None:
    for chat in CHATS:
        for prompt in (True, False):
            wanted = official.apply_chat_template(chat, add_generation_prompt=prompt, tokenize=False)
            assert ours.apply_chat_template(chat, add_generation_prompt=prompt, tokenize=False) == wanted


def test_the_template_writes_tools_calls_and_results_as_qwen3s_does(ours: Any, official: Any) -> None:
    for turns in (TOOL_TURNS[:1], TOOL_TURNS[:4], TOOL_TURNS[:6], [CHATS[1][0], *TOOL_TURNS[:6]]):
        for tools in (None, [TOOL], [TOOL, TOOL]):
            wanted = official.apply_chat_template(turns, tools=tools, add_generation_prompt=True, tokenize=False)
            assert ours.apply_chat_template(turns, tools=tools, add_generation_prompt=True, tokenize=False) == wanted


def test_the_template_refuses_other_roles(ours: Any) -> None:
    with pytest.raises(Exception, match="role 'critic' is none of system, user, assistant, tool"):
        ours.apply_chat_template([{"role": "critic", "content": "x"}], tokenize=False)


def test_the_official_tokenizer_gives_its_published_ids(official: Any) -> None:
    ids = encode_texts(official, ["Hello, world!", "你好，世界"])
    assert ids == [[9707, 11, 1879, 0], [108386, 3837, 99489]]


def test_special_tokens_come_last_and_close_the_vocabulary(ours: Any) -> None:
    assert len(ours) == 310
    assert ours.convert_tokens_to_ids("<|endoftext|>") == 301
    assert ours.eos_token_id == ours.pad_token_id == 301


def test_few_words_give_a_smaller_vocabulary(tmp_path: Path) -> None:
    train_bpe(["ab ab"], 400, tmp_path)
    assert len(load_tokenizer(tmp_path)) == 256 + 2 + ADDED  # two merges: ab, and space + ab


def test_any_text_comes_back_and_spelled_special_tokens_stay_text(ours: Any) -> None:
    text = "Grüße 你好 😀\r\n\t def f(x): <|endoftext|> <|im_end|> <think> don't 12345"
    (ids,) = encode_texts(ours, [text])
    assert decode_text(ours, ids) == text
    assert not {301, 302, 303} & set(ids)


def test_another_process_trains_the_same_bytes(tmp_path: Path) -> None:
    texts = [story(number) for number in range(50)]
    (tmp_path / "texts.json").write_text(json.dumps(texts))
    program = (
        "import json, sys; from pathlib import Path; from llmtrain.data.tokenizer import train_bpe\n"
        "directory = Path(sys.argv[1])\n"
        "train_bpe(json.loads((directory / 'texts.json').read_text()), 380, directory / 'theirs')"
    )
    subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=True)
    train_bpe(texts, 380, tmp_path / "mine")
    for file in sorted((tmp_path / "theirs").iterdir()):
        assert file.read_bytes() == (tmp_path / "mine" / file.name).read_bytes()


def test_the_hash_survives_saving_and_loading_elsewhere(ours: Any, tokenizer_dir: Path, tmp_path: Path) -> None:
    ours.save_pretrained(tmp_path)
    assert tokenizer_sha256(load_tokenizer(tmp_path)) == tokenizer_sha256(ours)
    assert tokenizer_sha256(ours) == (tokenizer_dir / "sha256").read_text()


@pytest.mark.parametrize("change", ["merge", "special", "template", "eos"])
def test_the_hash_sees_one_merge_special_token_template_byte_or_eos(change: str, ours: Any, tmp_path: Path) -> None:
    ours.save_pretrained(tmp_path)
    path = tmp_path / {"template": "chat_template.jinja", "eos": "tokenizer_config.json"}.get(change, "tokenizer.json")
    text = path.read_text()
    match change:
        case "template":
            text += " "
        case "eos":
            text = text.replace('"eos_token": "<|endoftext|>"', '"eos_token": "<|im_end|>"')
        case "special":
            text = text.replace("<|im_start|>", "<|im_begin|>")
        case "merge":
            tokenizer = json.loads(text)
            merges = tokenizer["model"]["merges"]
            merges[0], merges[1] = merges[1], merges[0]
            text = json.dumps(tokenizer)
    assert text != path.read_text()
    path.write_text(text)
    assert tokenizer_sha256(load_tokenizer(tmp_path)) != tokenizer_sha256(ours)


@pytest.mark.parametrize("name", ["./nowhere", "/nowhere/at/all", "a/b/c", Path("nowhere")])
def test_a_directory_that_is_missing_is_an_error_with_its_path(name: str | Path) -> None:
    with pytest.raises(DataError, match=r"no tokenizer at /.*nowhere|no tokenizer at /.*a/b/c"):
        load_tokenizer(name)


def test_a_directory_without_a_tokenizer_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="has no tokenizer"):
        load_tokenizer(tmp_path)


def test_a_hub_id_without_a_network_says_where_else_to_look(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match="'llmtrain-nobody/nothing': there is no such directory here") as error:
        load_tokenizer("llmtrain-nobody/nothing")
    assert "set model.tokenizer.path to a directory with tokenizer.json" in str(error.value)
