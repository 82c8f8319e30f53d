"""The documentation that every Python interpreter carries, read without importing what it documents."""

import ast
import os
import sys
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path

from llmtrain.config.base import content_hash
from llmtrain.errors import DataError

SOURCE = f"Python {'.'.join(map(str, sys.version_info[:3]))} documentation"
LICENCE = "PSF-2.0"
NOT_THE_LIBRARY = {"test", "tests", "idle_test", "__pycache__", "pydoc_data"}

Documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def topics() -> dict[str, str]:
    """The language reference's chapters on syntax and types, as `help()` shows them, by topic.

    Raises DataError where the interpreter was installed without them.
    """
    try:
        from pydoc_data.topics import topics as text_of_topic
    except ImportError as error:
        raise DataError(
            f"the interpreter {sys.executable} has no pydoc_data; use a full Python installation or choose another data"
        ) from error
    return dict(sorted(text_of_topic.items()))


def modules() -> Iterator[tuple[str, str]]:
    """The name of each standard module that has docstrings, with all of them as one text.

    Tests and installed packages are left out. C modules have no source to parse and are left out too.
    """
    for name, tree in module_trees():
        if text := "\n\n".join(sections(tree, name)):
            yield name, text


def module_trees() -> Iterator[tuple[str, ast.Module]]:
    """Dotted name and syntax tree of each standard module with a source, sorted by name."""
    for path, name in _module_files():
        with warnings.catch_warnings(action="ignore"):  # invalid escapes in the library's own strings
            yield name, ast.parse(path.read_bytes())


def fingerprint() -> str:
    """Changes when the interpreter or one of its library's files does: version, build, sizes and modification times."""
    statistics = [(path, path.stat()) for path, _ in _module_files()]
    files = [[str(path), facts.st_size, facts.st_mtime_ns] for path, facts in statistics]
    return content_hash([sys.version, sys.implementation.name, files])


def _module_files() -> list[tuple[Path, str]]:
    """Path and dotted name of each module, sorted by name."""
    root = sysconfig.get_path("stdlib")
    files = []
    for directory, subdirectories, names in os.walk(root):
        subdirectories[:] = [
            name for name in subdirectories if name.isidentifier() and name not in NOT_THE_LIBRARY
        ]  # `site-packages` and `config-3.11-...` are no names of packages
        for path in (Path(directory, name) for name in names if name.endswith(".py")):
            parts = path.relative_to(root).with_suffix("").parts
            files.append((path, ".".join(parts).removesuffix(".__init__")))
    return sorted(files, key=lambda file: file[1])


def sections(node: Documented, name: str) -> Iterator[str]:
    """`heading, empty line, docstring` of a node and of all inside it, in the order of the file."""
    for inner, dotted, docstring in documented(node, name):
        yield f"{_heading(inner, dotted)}\n\n{docstring}"


def documented(node: Documented, name: str) -> Iterator[tuple[Documented, str, str]]:
    """Node, dotted name and docstring of a node and of all inside it that have one, in the order of the file."""
    if docstring := ast.get_docstring(node):
        yield node, name, docstring
    for child in _documented_children(node):
        yield from documented(child, f"{name}.{child.name}")


def _documented_children(node: ast.AST) -> Iterator[ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef]:
    """Classes and functions right inside a node, those under `if` and `try` included."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield child
        elif isinstance(child, ast.stmt | ast.excepthandler):
            yield from _documented_children(child)


def _heading(node: Documented, name: str) -> str:
    match node:
        case ast.Module():
            return f"module {name}"
        case ast.ClassDef():
            return f"class {name}"
        case ast.FunctionDef() | ast.AsyncFunctionDef():
            return call(node, name)


def call(function: ast.FunctionDef | ast.AsyncFunctionDef, name: str) -> str:
    """`name(arguments) -> what it returns`, as the source has it."""
    returns = f" -> {ast.unparse(function.returns)}" if function.returns else ""
    return f"{name}({ast.unparse(function.args)}){returns}"
