"""Text as it comes: the pieces make the whole text, cut at the first stop text, without broken characters."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmtrain.data.tokenizer import MARKUP_TOKENS, SPECIAL_TOKENS
from llmtrain.serving.stopping import UNKNOWN, Detokeniser, StopTexts


def whole(tokenizer: Any, ids: list[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def pieces(tokenizer: Any, ids: list[int]) -> list[str]:
    detokeniser = Detokeniser(tokenizer)
    return [*(detokeniser.push(token) for token in ids), detokeniser.flush()]


class Counting:
    """A tokenizer that counts the tokens that it decodes."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer, self.decoded = tokenizer, 0

    def decode(self, token_ids: list[int], **how: Any) -> str:
        self.decoded += len(token_ids)
        return self.tokenizer.decode(token_ids, **how)


@settings(max_examples=300)
@given(st.data())
def test_pieces_make_the_whole_text(bpe: Any, data):
    odd = [
        bpe.convert_tokens_to_ids(token)
        for token in ("Ã", "ð", "Ł", "ĺ", "Ģ", "ÿ", "À", *SPECIAL_TOKENS, *MARKUP_TOKENS)
    ]
    token = st.one_of(st.integers(0, len(bpe) - 1), st.sampled_from(odd))
    ids = data.draw(st.lists(token, max_size=60))
    assert "".join(pieces(bpe, ids)) == whole(bpe, ids)


@given(text=st.text(max_size=40))
def test_no_piece_of_a_text_has_a_broken_character(bpe: Any, text: str):
    ids = bpe(text).input_ids
    found = pieces(bpe, ids)
    assert "".join(found) == whole(bpe, ids)
    if UNKNOWN not in text:
        assert not any(UNKNOWN in piece for piece in found)


def test_a_character_of_several_tokens_comes_whole(bpe: Any):
    ids = bpe("a€b").input_ids
    assert len(ids) == 5, "the sign is three tokens, one for each of its bytes"
    assert pieces(bpe, ids) == ["a", "", "", "€", "b", ""]
    assert pieces(bpe, ids[:3]) == ["a", "", "", UNKNOWN], "an unfinished one shows at the end"


def test_special_tokens_have_no_text_and_others_that_were_added_have(bpe: Any):
    ids = bpe("a<|im_end|><think>b").input_ids
    assert "".join(pieces(bpe, ids)) == "a<think>b"


@pytest.mark.parametrize("text", ["the quick brown fox ", "🦉"])
def test_the_cost_of_a_token_does_not_grow_with_the_text(bpe: Any, text: str):
    counting = Counting(bpe)
    ids = (bpe(text).input_ids * 500)[:1000]
    pieces(counting, ids)
    assert counting.decoded <= 8 * len(ids)


@pytest.mark.parametrize("byte", ["ÿ", "Ģ", "ð"])  # 0xFF, never in UTF-8; 0x80, a continuation; 0xF0, a beginning
def test_the_cost_of_undecodable_bytes_is_bounded_too(bpe: Any, byte: str):
    counting = Counting(bpe)
    ids = [bpe.convert_tokens_to_ids(byte)] * 1000
    assert "".join(pieces(counting, ids)) == UNKNOWN * 1000
    assert counting.decoded <= 25 * len(ids)


def cut(text: str, stops: list[str]) -> tuple[str, bool]:
    """The rule, letter by letter: the text before the stop text that ends first, the longest of those."""
    for end in range(1, len(text) + 1):
        if found := [stop for stop in stops if text[:end].endswith(stop)]:
            return text[: end - max(map(len, found))], True
    return text, False


letters = st.text("ab", max_size=5)


@settings(max_examples=500)
@given(texts=st.lists(letters, max_size=8), stops=st.lists(letters.filter(bool), max_size=3))
def test_text_is_cut_at_the_first_stop_text_however_it_comes(texts: list[str], stops: list[str]):
    finder, shown = StopTexts(stops), ""
    for text in texts:
        shown += finder.push(text)
        assert cut("".join(texts), stops)[0].startswith(shown), "nothing is shown that must not be"
    expected, found = cut("".join(texts), stops)
    assert finder.found == found
    assert shown + finder.flush() == expected


def test_only_what_may_become_a_stop_text_is_held_back():
    finder = StopTexts(["\nUser:", "###"])
    assert [finder.push(text) for text in ("Hi", "\nUs", "ually", " #", "#", "# x")] == [
        "Hi",
        "",
        "\nUsually",
        " ",
        "",
        "",
    ]
    assert finder.found
    assert finder.flush() == ""


def test_without_stop_texts_nothing_is_held_back():
    finder = StopTexts([])
    assert (finder.push("abc"), finder.flush(), finder.found) == ("abc", "", False)
