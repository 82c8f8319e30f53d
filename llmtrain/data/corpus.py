"""`data.corpus` as documents."""

from collections.abc import Iterator
from dataclasses import dataclass

from llmtrain.config.base import content_hash
from llmtrain.config.data import ChatFile, Corpus, JsonlText, PreferenceFile, PythonDocs, TextFiles, VoteFile
from llmtrain.data import python_docs
from llmtrain.data.input_files import JsonLine, Refused, fault_of, matching_files, read_json_lines, read_utf8
from llmtrain.files import sha256_of


@dataclass(frozen=True)
class Document:
    """One text, where it comes from, and under which terms."""

    name: str
    """Unique in its corpus: the path, file:line, or the topic or module."""
    text: str
    source: str
    """What it belongs to. The same wherever the files lie."""
    licence: str


def read_corpus(corpus: Corpus) -> Iterator[Document | Refused]:
    """The documents of a corpus in a fixed order, and what had to be refused, with the reason.

    Raises DataError for a missing file, a glob without a match, or a file that is not UTF-8.
    """
    match corpus:
        case PythonDocs():
            for topic, text in python_docs.topics().items():
                yield _checked(Document(f"topics/{topic}", text, python_docs.SOURCE, python_docs.LICENCE))
            for module, text in python_docs.modules():
                yield _checked(Document(module, text, python_docs.SOURCE, python_docs.LICENCE))
        case TextFiles():
            for path in matching_files(corpus.paths):
                yield _checked(Document(str(path), read_utf8(path), "text files", corpus.licence), where=f"{path}:1")
        case JsonlText():
            for path in matching_files(corpus.paths):
                for line in read_json_lines(path):
                    yield line if isinstance(line, Refused) else _json_document(line, corpus)


def fingerprint(source: Corpus | PreferenceFile | VoteFile | ChatFile) -> str:
    """A key of the content behind a source: while it stays the same, what was prepared from it can be used again.

    Files are hashed (not their paths), the interpreter's library is judged by sizes and times.
    """
    if isinstance(source, PythonDocs):
        return python_docs.fingerprint()
    return content_hash([sha256_of(path) for path in matching_files(source.paths)])


def _json_document(line: JsonLine, corpus: JsonlText) -> Document | Refused:
    if corpus.text_field not in line.fields:
        has = ", ".join(sorted(line.fields)) or "none"
        return Refused(line.where, f"has no field '{corpus.text_field}' (data.corpus.text_field); its fields: {has}")
    text = line.fields[corpus.text_field]
    if fault := fault_of(text):
        return Refused(line.where, f"'{corpus.text_field}' {fault}")
    return Document(line.where, text, "JSON lines", corpus.licence)


def _checked(document: Document, where: str = "") -> Document | Refused:
    fault = fault_of(document.text)
    return Refused(where or document.name, f"the text {fault}") if fault else document
