import json
from pathlib import Path

import pytest

from llmtrain.data.input_files import JsonLine, Refused, fault_of, matching_files, read_json_lines, read_utf8
from llmtrain.errors import DataError


def test_files_of_overlapping_globs_come_once_and_sorted(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    files = [tmp_path / "b.txt", tmp_path / "a[1].txt", tmp_path / "deep" / "c.txt"]
    for file in files:
        file.touch()
    found = matching_files((f"{tmp_path}/*.txt", f"{tmp_path}/**/*.txt", f"{tmp_path}/a[1].txt"))
    assert found == sorted(files)


@pytest.mark.parametrize(
    ("pattern", "reason"), [("none/*.txt", "matches no file"), ("none.txt", "no such file"), (".", "is a directory")]
)
def test_a_path_without_a_file_is_named(
    pattern: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=reason) as error:
        matching_files((pattern,))
    assert str(error.value).startswith(pattern)


def test_a_file_in_another_encoding_is_named_with_the_offset_and_the_command_that_converts_it(tmp_path: Path) -> None:
    path = tmp_path / "old.txt"
    path.write_bytes("grün".encode("latin1"))
    with pytest.raises(
        DataError, match=r"byte 0xfc at offset 2; convert it with `iconv -f ENCODING -t UTF-8 .*old.txt"
    ):
        read_utf8(path)


def test_the_offset_counts_from_the_start_of_the_file_in_json_lines_too(tmp_path: Path) -> None:
    path = tmp_path / "old.jsonl"
    path.write_bytes(b'{"text": "a"}\n{"text": "\xfc"}\n')
    with pytest.raises(DataError, match="offset 24"):
        list(read_json_lines(path))


def test_a_byte_order_mark_is_no_text_and_line_ends_stay(tmp_path: Path) -> None:
    path = tmp_path / "windows.txt"
    path.write_bytes(b"\xef\xbb\xbfone\r\ntwo")
    assert read_utf8(path) == "one\r\ntwo"


def test_json_lines_are_numbered_blank_ones_skipped_and_malformed_ones_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text('{"a": 1}\n\n{"a": \n[1]\n' + "[" * 100_000 + "\n" + '{"n": ' + "9" * 5000 + "}\n" + '{"a": 2}')
    lines = list(read_json_lines(path))
    assert lines[0] == JsonLine(f"{path}:1", {"a": 1})
    assert lines[-1] == JsonLine(f"{path}:7", {"a": 2})
    refused = lines[1:-1]
    assert all(isinstance(line, Refused) for line in refused)
    assert [line.where for line in refused] == [f"{path}:{number}" for number in (3, 4, 5, 6)]


@pytest.mark.parametrize(
    ("value", "fault"),
    [
        (None, "is null, not a string"),
        (True, "is a truth value, not a string"),
        ([{"role": "user"}], "is a list, not a string"),
        (" \n", "is empty"),
        ("ab\0", "has a NUL character at position 2"),
        (json.loads('"é\\ud83d"'), "has half of a surrogate pair at position 1"),
        ("fine 😀", None),
    ],
)
def test_faults_of_a_text(value: object, fault: str | None) -> None:
    assert fault_of(value) == fault
