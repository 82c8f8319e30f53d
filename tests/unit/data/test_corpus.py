import ast
from pathlib import Path

from llmtrain.config.data import JsonlText, PythonDocs, TextFiles
from llmtrain.data import python_docs
from llmtrain.data.corpus import Document, fingerprint, read_corpus
from llmtrain.data.input_files import Refused

PYTHON = PythonDocs(kind="python_docs")


def jsonl(path: Path) -> JsonlText:
    return JsonlText(kind="jsonl", paths=(str(path),), text_field="text", licence="CC-BY-4.0")


def files(*paths: str) -> TextFiles:
    return TextFiles(kind="files", paths=paths, licence="MIT")


def test_each_text_file_is_a_document(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_text("second")
    (tmp_path / "a.txt").write_text("first")
    (tmp_path / "c.txt").write_text("")
    assert list(read_corpus(files(f"{tmp_path}/*.txt"))) == [
        Document(f"{tmp_path}/a.txt", "first", "text files", "MIT"),
        Document(f"{tmp_path}/b.txt", "second", "text files", "MIT"),
        Refused(f"{tmp_path}/c.txt:1", "the text is empty"),
    ]


def test_each_json_line_is_a_document_or_refused_with_its_line_and_reason(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text('{"text": "hello", "id": 1}\n{"body": "x", "id": 2}\n{"text": 5}\n{"text": "\\ud800"}\noops\n')
    assert list(read_corpus(jsonl(path))) == [
        Document(f"{path}:1", "hello", "JSON lines", "CC-BY-4.0"),
        Refused(f"{path}:2", "has no field 'text' (data.corpus.text_field); its fields: body, id"),
        Refused(f"{path}:3", "'text' is a number, not a string"),
        Refused(f"{path}:4", "'text' has half of a surrogate pair at position 0"),
        Refused(f"{path}:5", "malformed JSON: Expecting value at column 1"),
    ]


def test_the_fingerprint_of_files_is_their_content_not_their_place(tmp_path: Path) -> None:
    for directory in ("one", "two"):
        (tmp_path / directory).mkdir()
        (tmp_path / directory / "x.txt").write_text("same")
    one, two = files(f"{tmp_path}/one/*"), files(f"{tmp_path}/two/*")
    assert fingerprint(one) == fingerprint(two)
    (tmp_path / "two" / "x.txt").write_text("other")
    assert fingerprint(one) != fingerprint(two)


def test_python_docs_have_the_language_reference_and_the_docstrings_of_the_library() -> None:
    documents = list(read_corpus(PYTHON))
    assert all(isinstance(document, Document) for document in documents)
    texts = {document.name: document.text for document in documents if isinstance(document, Document)}
    assert 'The "with" statement' in texts["topics/with"]
    assert texts["bisect"].startswith("module bisect\n\nBisection algorithms.\n\nbisect.insort_right(a, x, lo=0, ")
    assert "\n\nclass pathlib.Path\n\nPurePath subclass that can make system calls." in texts["pathlib"]
    assert not [name for name in texts if {"test", "tests", "idle_test"} & set(name.split("."))]
    assert len(texts) == len(documents) > 500
    assert 1_500_000 < sum(map(len, texts.values())) < 4_000_000
    assert {document.licence for document in documents if isinstance(document, Document)} == {"PSF-2.0"}


def test_headings_name_what_stands_inside_conditions_and_classes_with_its_signature() -> None:
    source = '''
try:
    class Outer:
        "About Outer."
        async def go(self, *, fast: bool = True) -> None:
            """About go.

            More.
            """
except ImportError:
    def fallback(): "About fallback."
'''
    sections = list(python_docs.sections(ast.parse(source), "m"))
    assert sections == [
        "class m.Outer\n\nAbout Outer.",
        "m.Outer.go(self, *, fast: bool=True) -> None\n\nAbout go.\n\nMore.",
        "m.fallback()\n\nAbout fallback.",
    ]


def test_the_fingerprint_of_python_docs_stays_the_same() -> None:
    assert fingerprint(PYTHON) == fingerprint(PYTHON)
