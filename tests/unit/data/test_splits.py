import json
from collections import Counter
from pathlib import Path

import pytest
from data_samples import SHARES, silent, story, text_data_of

from llmtrain.config.data import JsonlText, TextData
from llmtrain.data.splits import SplitCorpus, split_of
from llmtrain.errors import DataError


def split(data: TextData, tmp_path: Path) -> dict[str, str]:
    """Split of each text."""
    return {document.text: name for name, document in SplitCorpus(data, tmp_path / "report.jsonl", silent)}


def jsonl_data(path: Path, texts: list[object], **changes: float) -> TextData:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    corpus = JsonlText(kind="jsonl", paths=(str(path),), text_field="text", licence="CC0-1.0")
    return TextData.model_validate({"kind": "text", "corpus": corpus, **SHARES, **changes})


def test_shares_are_kept_within_four_standard_deviations() -> None:
    counts = Counter(split_of(f"text {number}", 0, validation_share=0.05, test_share=0.1) for number in range(20_000))
    assert abs(counts["validation"] - 1000) < 4 * 31
    assert abs(counts["test"] - 2000) < 4 * 43


def test_a_split_depends_on_seed_and_text_only() -> None:
    texts = [f"text {number}" for number in range(200)]
    assert [split_of(text, 0, 0.2, 0.2) for text in texts] != [split_of(text, 1, 0.2, 0.2) for text in texts]
    held_out = {text for text in texts if split_of(text, 0, 0.2, 0.2) == "test"}
    assert held_out == {text for text in texts if split_of(text, 0, 0.3, 0.2) == "test"}  # whatever validation takes


def test_order_and_neighbours_do_not_change_a_documents_split(tmp_path: Path) -> None:
    texts = [story(number) for number in range(30)]
    forward = split(jsonl_data(tmp_path / "a.jsonl", [*texts]), tmp_path)
    backward = split(jsonl_data(tmp_path / "b.jsonl", [*texts[::-1], "one more"]), tmp_path)
    assert forward == {text: backward[text] for text in texts}


def test_duplicates_are_dropped_and_counted(tmp_path: Path) -> None:
    texts = [story(number) for number in range(30)]
    corpus = SplitCorpus(
        jsonl_data(tmp_path / "a.jsonl", [*texts, texts[3], texts[3], texts[7]]), tmp_path / "r", silent
    )
    assert [document.text for _, document in corpus] == texts
    assert corpus.num_duplicates == 3


def test_a_single_document_is_cut_by_position_and_that_is_said(tmp_path: Path) -> None:
    text = "".join(f"line {number}\n" for number in range(1000))
    (tmp_path / "one.txt").write_text(text)
    (tmp_path / "copy.txt").write_text(text)
    said: list[str] = []
    corpus = SplitCorpus(text_data_of(f"{tmp_path}/*.txt"), tmp_path / "r", said.append)
    parts = list(corpus)
    assert [name for name, _ in parts] == ["train", "validation", "test"]
    assert "".join(part.text for _, part in parts) == text
    assert len(parts[0][1].text) == round(0.6 * len(text))
    assert parts[0][1].name == f"{tmp_path}/copy.txt[0:{round(0.6 * len(text))}]"
    assert corpus.num_duplicates == 1
    assert "cut by position" in said[0]


@pytest.mark.parametrize(
    ("length", "shares", "lengths"),
    [
        (1_115_394, (0.05, 0.05), [1_003_854, 55_770, 55_770]),  # tiny Shakespeare; nanoGPT trains on int(0.9 * length)
        (60, (0.05, 0.05), [54, 3, 3]),  # in binary, 1 - 0.05 - 0.05 is a little less than 0.9
        (19, (0.25, 0.25), [9, 5, 5]),
    ],
)
def test_borders_by_position_are_the_shares_rounded_down(
    length: int, shares: tuple[float, float], lengths: list[int], tmp_path: Path
) -> None:
    (tmp_path / "one.txt").write_text("".join(chr(0x4E00 + position % 5000) for position in range(length)))
    data = text_data_of(f"{tmp_path}/one.txt", validation_share=shares[0], test_share=shares[1])
    assert [len(part.text) for _, part in SplitCorpus(data, tmp_path / "r", silent)] == lengths


def test_a_corpus_too_short_for_three_splits_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_text("ab")
    with pytest.raises(DataError, match=r"leave nothing for validation; add text, or raise data.validation_share"):
        split(text_data_of(f"{tmp_path}/x.txt"), tmp_path)


def test_no_text_at_all_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no text at all"):
        split(jsonl_data(tmp_path / "empty.jsonl", []), tmp_path)


def test_too_many_refused_records_stop_with_the_first_and_a_file_of_all(tmp_path: Path) -> None:
    texts: list[object] = [story(number) for number in range(30)]
    data = jsonl_data(tmp_path / "a.jsonl", [*texts, *[None] * 10, 5])
    with pytest.raises(DataError, match=r"11 of 41 records are refused(.|\n)*a.jsonl:31: 'text' is null") as error:
        split(data, tmp_path)
    assert "report.jsonl" in str(error.value)
    assert len((tmp_path / "report.jsonl").read_text().splitlines()) == 11


def test_few_refused_records_are_left_out_and_kept_with_their_reason(tmp_path: Path) -> None:
    texts: list[object] = [story(number) for number in range(30)]
    corpus = SplitCorpus(jsonl_data(tmp_path / "a.jsonl", [*texts, *[None] * 10]), tmp_path / "r", silent)
    assert len(list(corpus)) == 30  # 10 of 40 is just the allowed quarter
    assert len(corpus.refused) == 10
