"""The user's files: found, decoded, and each bad record named by file and line."""

import glob
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmtrain.errors import DataError

BYTE_ORDER_MARK = b"\xef\xbb\xbf"
NOT_TEXT = {
    b"%PDF-": "a PDF; extract its text first (`pdftotext` does where it has any; a scan needs OCR)",
    b"PK\x03\x04": "a ZIP archive, as DOCX, PPTX, XLSX and EPUB are; extract its text first (`pandoc -t plain`)",
    b"\xd0\xcf\x11\xe0": "an old Office file; save it as text first",
    b"\x1f\x8b": "gzip-compressed; unpack it first (`gunzip`)",
}
"""How files begin that are often taken for text, and what to do with them."""
ARRAY_OF_OBJECTS = re.compile(rb"\s*\[\s*[{\]]")
_SPACE, _COMMA, _CLOSES = (re.compile(pattern) for pattern in (r"\s*", r"\s*,", r"\s*\]"))
SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True)
class Refused:
    """A record that is left out."""

    where: str
    """file:line"""
    reason: str


@dataclass(frozen=True)
class JsonLine:
    """One JSON object of a JSON lines file."""

    where: str
    """file:line"""
    fields: dict[str, Any]


def matching_files(paths: tuple[str, ...]) -> list[Path]:
    """The files that the paths and globs name, each once, sorted by path.

    Raises DataError where a path does not exist, a glob matches no file, or a path is a directory.
    """
    found: set[Path] = set()
    for pattern in paths:
        path = Path(pattern).expanduser()
        if path.is_dir():
            raise DataError(f"{pattern} is a directory; name its files, such as '{pattern.rstrip('/')}/**/*.txt'")
        if path.exists():
            found.add(path)
            continue
        matches = [Path(match) for match in glob.glob(str(path), recursive=True)]
        files = {match for match in matches if match.is_file()}
        if not files:
            missing = "this glob matches no file" if glob.has_magic(pattern) else "no such file"
            raise DataError(f"{pattern}: {missing} (looked from {Path.cwd()}); correct the path under data")
        found |= files
    return sorted(found)


def read_utf8(path: Path) -> str:
    """The text of a file, line ends as they are, a byte order mark removed; raises DataError where it is not UTF-8, or
    a PDF, an archive or an Office file.
    """
    raw = path.read_bytes()
    _check_is_text(raw, path)
    return _decode(raw.removeprefix(BYTE_ORDER_MARK), path, offset=0)


def read_json_lines(path: Path) -> Iterator[JsonLine | Refused]:
    """The objects of a JSON lines file; blank lines are skipped, malformed ones refused.

    Raises DataError as `read_utf8` does.
    """
    offset = 0
    with path.open("rb") as file:
        for number, raw in enumerate(file, start=1):
            if number == 1:
                _check_is_text(raw, path)
            line = _decode(raw.removeprefix(BYTE_ORDER_MARK) if number == 1 else raw, path, offset)
            offset += len(raw)
            if line.strip():
                yield _parse(line, f"{path}:{number}")


def read_json_records(path: Path) -> Iterator[JsonLine | Refused]:
    """The objects of a file of JSON lines, or of one that holds a single JSON array of objects.

    Each is named by the line on which it begins. Raises DataError as `read_utf8` does, and where an array is broken:
    what stands behind the break cannot be told apart.
    """
    with path.open("rb") as file:
        beginning = file.read(1000).removeprefix(BYTE_ORDER_MARK)
    if ARRAY_OF_OBJECTS.match(beginning):
        yield from _array_objects(read_utf8(path), path)
    else:
        yield from read_json_lines(path)


def fault_of(text: Any) -> str | None:
    """Why `text` cannot be trained on, or None where it can."""
    if not isinstance(text, str):
        return f"is {_json_type(text)}, not a string"
    if not text.strip():
        return "is empty"
    if "\0" in text:
        return f"has a NUL character at position {text.index(chr(0))}"
    if surrogate := SURROGATE.search(text):
        return f"has half of a surrogate pair at position {surrogate.start()}"
    return None


def _check_is_text(beginning: bytes, path: Path) -> None:
    for signature, words in NOT_TEXT.items():
        if beginning.startswith(signature):
            raise DataError(f"{path} is no text: it is {words}")


def _decode(raw: bytes, path: Path, offset: int) -> str:
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path} is not UTF-8: byte 0x{raw[error.start]:02x} at offset {offset + error.start}; convert it with "
            f"`iconv -f ENCODING -t UTF-8 {path} > {path.stem}.utf8{path.suffix}`, where ENCODING is what it was "
            f"written in (LATIN1, SHIFT_JIS, UTF-16, ...)"
        ) from error


def _parse(line: str, where: str) -> JsonLine | Refused:
    try:
        value = json.loads(line)
    except json.JSONDecodeError as error:
        return Refused(where, f"malformed JSON: {error.msg} at column {error.colno}")
    except (ValueError, RecursionError) as error:  # a number of thousands of digits; brackets thousands deep
        return Refused(where, f"malformed JSON: {error}")
    return (
        JsonLine(where, value) if isinstance(value, dict) else Refused(where, f"is {_json_type(value)}, not an object")
    )


def _array_objects(text: str, path: Path) -> Iterator[JsonLine | Refused]:
    decoder, position, line = json.JSONDecoder(), text.index("[") + 1, 1
    counted = 0
    while True:
        position = _SPACE.match(text, position).end()  # type: ignore[union-attr]
        line += text.count("\n", counted, position)
        counted = position
        if text.startswith("]", position):
            break
        try:
            value, position = decoder.raw_decode(text, position)
        except (ValueError, RecursionError) as error:
            reason = error.msg if isinstance(error, json.JSONDecodeError) else error
            raise DataError(
                f"{path}:{line}: malformed JSON in the array: {reason}; correct it, or write JSON lines"
            ) from error
        yield (
            JsonLine(f"{path}:{line}", value)
            if isinstance(value, dict)
            else Refused(f"{path}:{line}", f"is {_json_type(value)}, not an object")
        )
        after = _COMMA.match(text, position)
        if not after and not _CLOSES.match(text, position):
            raise DataError(f"{path}:{line}: no comma after this object of the array; correct it, or write JSON lines")
        position = after.end() if after else position
    if text[position + 1 :].strip():
        raise DataError(f"{path}:{line}: text after the end of the array; write one array, or one object a line")


def _json_type(value: Any) -> str:
    match value:
        case None:
            return "null"
        case bool():
            return "a truth value"
        case int() | float():
            return "a number"
        case str():
            return "a string"
        case list():
            return "a list"
        case _:
            return "an object"
