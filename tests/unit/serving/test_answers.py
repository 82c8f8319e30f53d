"""What tokens stand for, and the forms of log-probabilities."""

import json
from typing import Any

import pytest
from transformers import AutoTokenizer

from llmtrain.client.protocol import ChatAnswer, CompletionAnswer
from llmtrain.serving.answers import AnswerWriter, Tokens, joined
from llmtrain.serving.jobs import Piece, TokenLogprob
from llmtrain.serving.reading import Asked, reader_of
from tests.unit.serving.test_reading import SERVED

TEXT = "naïve café, 中文 🎉 fox\n\x00\x7f­"


@pytest.fixture(scope="module")
def tokens(bpe: Any) -> Tokens:
    return Tokens(bpe)


def asked(bpe: Any, kind: Any, **body: Any) -> Asked:
    return reader_of(bpe, SERVED, 30, 400).asked(kind, json.dumps({"model": "m"} | body).encode())


def test_bytes_of_tokens_join_to_the_text(tokens: Tokens, bpe: Any) -> None:
    ids = bpe(TEXT)["input_ids"]
    assert b"".join(bytes(tokens.utf8(token)) for token in ids).decode() == TEXT
    assert any("\N{REPLACEMENT CHARACTER}" in tokens.text(token) for token in ids)  # some are parts of a character
    (special,) = bpe("<|im_end|>")["input_ids"]
    assert (bytes(tokens.utf8(special)), tokens.text(special)) == (b"<|im_end|>", "<|im_end|>")


def test_tokens_that_the_tokenizer_lacks_are_nothing(tokens: Tokens, bpe: Any) -> None:
    """Networks may have more columns than the tokenizer has tokens."""
    assert (tokens.text(len(bpe) + 5), tokens.utf8(len(bpe) + 5)) == ("", [])


def test_tokens_of_other_tokenizers_are_their_text(tmp_path: Any) -> None:
    from llmtrain.data.tokenizer import collect_characters

    collect_characters(["aé"], tmp_path)
    tokens = Tokens(AutoTokenizer.from_pretrained(tmp_path))
    assert tokens.utf8(tokens._tokenizer("é")["input_ids"][0]) == list("é".encode())


def test_prompt_log_probabilities_have_vllms_form(bpe: Any, tokens: Tokens) -> None:
    """The token itself first, its rank, and no more alternatives than were asked for; -9999 for minus infinity."""
    request = asked(bpe, "completion", prompt=[5, 6], prompt_logprobs=1, logprobs=0, echo=True)
    scored = TokenLogprob(6, float("-inf"), 300, ((9, -0.5), (8, -1.0)))
    piece = Piece("u/0", "x", (7,), (TokenLogprob(7, -0.25, 1, ()),), (scored,), "stop")
    answer = AnswerWriter(request, tokens, "u").whole([[piece]])
    (choice,) = answer["choices"]
    shown = {"logprob": -9999.0, "rank": 300, "decoded_token": tokens.text(6)}
    best = {"logprob": -0.5, "rank": 1, "decoded_token": tokens.text(9)}
    assert choice["prompt_logprobs"] == [None, {"6": shown, "9": best}]
    assert list(choice["prompt_logprobs"][1]) == ["6", "9"]
    assert choice["logprobs"]["token_logprobs"] == [None, -9999.0, -0.25]
    assert answer["usage"] == {"prompt_tokens": 2, "completion_tokens": 1, "total_tokens": 3}
    assert CompletionAnswer.model_validate_json(json.dumps(answer)).choices[0].finish_reason == "stop"


def test_chats_give_their_prompt_once(bpe: Any, tokens: Tokens) -> None:
    messages = [{"role": "user", "content": "fox"}]
    request = asked(bpe, "chat", messages=messages, n=2, return_token_ids=True, prompt_logprobs=0)
    pieces = [[Piece(f"u/{index}", "a", (7,), prompt_logprobs=(), finish_reason="length")] for index in range(2)]
    answer = AnswerWriter(request, tokens, "u").whole(pieces)
    parsed = ChatAnswer.model_validate_json(json.dumps(answer))
    assert parsed.prompt_token_ids == request.jobs[0].ids
    assert [choice.token_ids for choice in parsed.choices] == [(7,), (7,)]
    assert parsed.prompt_logprobs == (None,)
    writer = AnswerWriter(request, tokens, "u")
    chunks = [chunk for index in (0, 1, 0) for chunk in writer.chunk(index, Piece(f"u/{index}", "", (7,)))]
    assert ["role" in chunk["choices"][0]["delta"] for chunk in chunks] == [True, True, False]
    assert ["prompt_token_ids" in chunk for chunk in chunks] == [True, True, False]


def test_held_back_text_is_not_sent_as_nothing(bpe: Any, tokens: Tokens) -> None:
    writer = AnswerWriter(asked(bpe, "completion", prompt="fox"), tokens, "u")
    sent = [list(writer.chunk(0, Piece("u/0", text, (7,)))) for text in ("", "", "ab", "")]
    assert [len(chunks) for chunks in sent] == [1, 0, 1, 0]  # the first says that the answer has begun


def test_pieces_join() -> None:
    one = TokenLogprob(7, -1.0, 1)
    first = Piece("u/0", "a", (7,), (one,), (one, one))
    assert joined([first, Piece("u/0", "b", (8, 9), (one, one), None, "stop")]) == Piece(
        "u/0", "ab", (7, 8, 9), (one, one, one), (one, one), "stop"
    )
