"""The pieces of text that forms are compared on, and those that rounding looks at."""

from pathlib import Path

import pytest
from transformers import AutoTokenizer

from llmtrain.errors import DataError
from llmtrain.optimise.texts import pieces
from tests.unit.optimise.conftest import settings


@pytest.fixture(scope="module")
def tokenizer(sources):
    return AutoTokenizer.from_pretrained(sources("tied"))


def test_every_second_text_is_for_comparing_and_no_piece_is_in_both(tokenizer, tmp_path: Path):
    for name in "abcd":
        (tmp_path / name).write_text(name * 200)
    config = settings("onnx_int8", f"text_paths=[{','.join(str(tmp_path / name) for name in 'abcd')}]")
    found = pieces(config, tokenizer, 256, num_others=4)
    assert {tokenizer.decode(piece) for piece in found.compared} == {"a" * 64, "c" * 64}
    assert {tokenizer.decode(piece) for piece in found.others} == {"b" * 64, "d" * 64}
    assert (len(found.compared), len(found.others)) == (6, 4)


def test_a_single_file_is_cut_in_two(tokenizer, tmp_path: Path):
    (tmp_path / "one").write_text("x" * 640 + "y" * 640)
    found = pieces(settings("onnx_int8", f"text_paths=[{tmp_path / 'one'}]"), tokenizer, 256, num_others=99)
    assert {tokenizer.decode(piece) for piece in found.compared} == {"x" * 64}
    assert [tokenizer.decode(piece) for piece in found.others] == ["y" * 64] * 10


def test_pieces_are_no_longer_than_the_context(tokenizer):
    found = pieces(settings("onnx_int8"), tokenizer, context_tokens=40, num_others=1)
    assert {len(piece) for piece in found.compared + found.others} == {40}


def test_too_little_text_is_refused_with_what_would_do(tokenizer, tmp_path: Path):
    (tmp_path / "short").write_text("z" * 400)
    config = settings("onnx_int8", f"text_paths=[{tmp_path / 'short'}]")
    with pytest.raises(DataError, match=r"3 pieces of 64 tokens .* 6 are asked for.* optimise.documents=3"):
        pieces(config, tokenizer, 256, num_others=1)


def test_a_file_that_is_no_text_is_refused(tokenizer, tmp_path: Path):
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match="cannot be read as UTF-8 text"):
        pieces(settings("onnx_int8", f"text_paths=[{tmp_path / 'binary'}]"), tokenizer, 256, num_others=1)
