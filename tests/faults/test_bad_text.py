"""Text that cannot be trained on: one message with the next step, exit code 2, and the rest is kept."""

import gzip
import io
import json
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from llmtrain.artifacts import DatasetManifest
from llmtrain.cli.train import main
from tests.faults.commands import PRETRAIN, files, jsonl

pytestmark = pytest.mark.usefixtures("here")


def zipped(name: str, content: str) -> bytes:
    """As DOCX, PPTX and EPUB are."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr(name, content)
    return file.getvalue()


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("empty.txt", b"", "empty.txt:1: the text is empty"),
        ("blank.txt", b" \n\t\n", "blank.txt:1: the text is empty"),
        (
            "latin.txt",
            "Größe".encode("latin-1"),
            "latin.txt is not UTF-8: byte 0xf6 at offset 2; convert it with `iconv",
        ),
        ("kanji.csv", "映画,料金".encode("shift-jis"), "kanji.csv is not UTF-8: byte 0x89 at offset 0"),
        ("wide.txt", "words".encode("utf-16"), "wide.txt is not UTF-8: byte 0xff at offset 0"),
        ("nul.txt", b"one\0two", "nul.txt:1: the text has a NUL character at position 3"),
        ("scan.pdf", b"%PDF-1.4\n%\xff", "scan.pdf is no text: it is a PDF; extract its text first"),
        ("ascii.pdf", b"%PDF-1.4\n1 0 obj", "ascii.pdf is no text: it is a PDF"),
        ("a.docx", zipped("word/document.xml", "<w/>"), "a.docx is no text: it is a ZIP archive, as DOCX"),
        ("a.epub", zipped("mimetype", "application/epub+zip"), "EPUB are; extract its text first (`pandoc -t plain`)"),
        ("a.txt.gz", gzip.compress(b"words", mtime=0), "a.txt.gz is no text: it is gzip-compressed; unpack it first"),
    ],
)
def test_a_file_that_is_no_text_is_named_with_what_it_is(name: str, content: bytes, said: str, fails):
    Path(name).write_bytes(content)
    fails([*PRETRAIN, *files(name)], 2, said)
    assert not list(Path("outputs").glob("data/*/manifest.json"))
    assert Path(name).read_bytes() == content


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("absent.txt", "absent.txt: no such file (looked from "),
        ("notes/*.txt", "notes/*.txt: this glob matches no file (looked from "),
        (".", ". is a directory; name its files, such as './**/*.txt'"),
    ],
)
def test_a_path_without_a_file_is_named(path: str, said: str, fails):
    fails([*PRETRAIN, *files(path)], 2, said)


REAL = {
    "MEDRPT-2024-PAT-3847_medical_report_scan.pdf": "it is a PDF; extract its text first (`pdftotext`",
    "movie-theater-booking-2024.pdf": "it is a PDF",
    "test.docx": "it is a ZIP archive",
    "test.epub": "it is a ZIP archive",
    "test.pptx": "it is a ZIP archive",
    "test_mskanji.csv": "is not UTF-8: byte 0x96 at offset 0; convert it with `iconv -f ENCODING -t UTF-8",
}


@pytest.mark.parametrize("name", REAL)
def test_real_documents_that_are_no_text_are_refused(name: str, fails, repository: Path):
    document = repository.parent / "shared" / "data" / "documents" / name
    if not document.exists():
        pytest.skip("needs ../shared")
    fails([*PRETRAIN, *files(str(document))], 2, f"{document} is ", REAL[name])


def test_a_real_process_says_it_and_leaves_no_traceback(repository: Path):
    Path("scan.pdf").write_bytes(b"%PDF-1.4")
    command = [sys.executable, str(repository / "train.py"), *PRETRAIN, *files("scan.pdf")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("scan.pdf is no text: it is a PDF")
    assert "Traceback" not in done.stderr


WRONG_LINES = {
    "{broken": "malformed JSON: Expecting property name enclosed in double quotes at column 2",
    '["text"]': "is a list, not an object",
    '{"body": "words"}': "has no field 'text' (data.corpus.text_field); its fields: body",
    '{"text": null}': "'text' is null, not a string",
    '{"text": 3}': "'text' is a number, not a string",
    '{"text": ["words"]}': "'text' is a list, not a string",
    '{"text": " "}': "'text' is empty",
    '{"text": "a\\u0000"}': "'text' has a NUL character at position 1",
    '{"text": "\\ud83d"}': "'text' has half of a surrogate pair at position 0",
}


@pytest.mark.parametrize("line", WRONG_LINES)
def test_a_wrong_line_is_named_with_its_reason_and_too_many_stop_the_run(line: str, fails, tmp_path: Path):
    lines = [json.dumps({"text": f"document {number} " * 30}) for number in range(10)] + [line]
    fails(
        [*PRETRAIN, *jsonl(tmp_path / "bad.jsonl", lines)],
        2,
        "1 of 11 records are refused, more than data.max_refused_share=0.05 allows:",
        f"  bad.jsonl:11: {WRONG_LINES[line]}\n",
        "correct the records or raise data.max_refused_share",
    )
    (report,) = Path("outputs").glob("tokenizers/*.refused.jsonl")
    assert json.loads(report.read_text()) == {"where": "bad.jsonl:11", "reason": WRONG_LINES[line]}


def test_a_few_wrong_lines_are_counted_and_the_rest_is_kept(trained, capsys):
    good = [json.dumps({"text": f"{number} is a number with a document of its own. " * 20}) for number in range(60)]
    lines = [*good, *WRONG_LINES, good[0]]
    assert main([*PRETRAIN, *jsonl(Path("mixed.jsonl"), lines), "data.max_refused_share=0.2"]) == 0
    capsys.readouterr()
    (reported,) = (path for path in Path("outputs/data").glob("*/refused.jsonl") if path.read_text())
    facts = DatasetManifest.read(reported.with_name("manifest.json"))
    assert sum(split.num_documents for split in facts.splits.values()) == 60
    assert (facts.num_refused, facts.num_duplicates) == (len(WRONG_LINES), 1)
    refused = [json.loads(line) for line in reported.read_text().splitlines()]
    reasons = enumerate(WRONG_LINES.values(), start=61)
    assert refused == [{"where": f"mixed.jsonl:{number}", "reason": reason} for number, reason in reasons]
