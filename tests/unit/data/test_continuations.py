import pytest
from data_samples import story

from llmtrain.data.continuations import Passage, continuation_pairs, sample, windows
from llmtrain.data.preferences import PairText
from llmtrain.errors import DataError

DOCUMENTS = [Passage(str(number), story(number, 100)) for number in range(4)]


def made(documents: list[Passage], seed: int = 0) -> list[PairText]:
    pairs = list(continuation_pairs("train", documents, 40, 20, seed))
    assert all(isinstance(pair, PairText) for pair in pairs)
    return [pair for pair in pairs if isinstance(pair, PairText)]


def test_windows_begin_at_words_break_at_spaces_and_do_not_overlap() -> None:
    text = "one two three four five six"
    assert list(windows(text, prompt_characters=8, answer_characters=5)) == [("one two", " thre"), ("four", " five")]


def test_a_word_longer_than_the_prompt_is_passed_over() -> None:
    assert list(windows("abcdefghijklmno one two", 4, 4)) == [("one", " two")]


def test_answers_are_equally_long_and_begin_with_white_space() -> None:
    for pair in made(DOCUMENTS):
        assert len(pair.chosen) == len(pair.rejected) == 20
        assert pair.chosen[0].isspace()
        assert pair.rejected[0].isspace()
        assert not pair.prompt[0].isspace()
        assert not pair.prompt[-1].isspace()
        assert 0 < len(pair.prompt) <= 40


def test_chosen_is_what_follows_and_rejected_stands_in_another_document() -> None:
    texts = {document.name: document.text for document in DOCUMENTS}
    pairs = made(DOCUMENTS)
    assert {pair.where for pair in pairs} == set(texts)
    for pair in pairs:
        assert pair.prompt + pair.chosen in texts[pair.where]
        assert pair.rejected != pair.chosen
        assert any(pair.rejected in text for name, text in texts.items() if name != pair.where)


def test_pairs_depend_on_the_seed_only() -> None:
    assert made(DOCUMENTS) == made(DOCUMENTS)
    assert [pair.rejected for pair in made(DOCUMENTS)] != [pair.rejected for pair in made(DOCUMENTS, seed=1)]


def test_one_document_has_no_other_to_lend_an_answer() -> None:
    with pytest.raises(DataError, match=r"two documents with more than 20 characters in each split; train has 1"):
        made([DOCUMENTS[0], Passage("short", "a b c")])


def test_text_without_room_for_a_prompt_is_an_error() -> None:
    with pytest.raises(DataError, match=r"no document of the split train holds 40 \+ 20 characters"):
        made([Passage(letter, letter * 50 + " " + letter * 30) for letter in "ab"])


def test_a_sample_is_spread_keeps_the_order_and_grows_by_adding() -> None:
    pairs = made(DOCUMENTS)
    few, more = sample(pairs, 5, seed=0), sample(pairs, 9, seed=0)
    assert (len(few), len(more)) == (5, 9)
    assert [pair for pair in more if pair in few] == few
    assert more == [pair for pair in pairs if pair in more]
    assert len({pair.where for pair in more}) > 1
    assert sample(pairs, 10**6, seed=0) == pairs
