"""Where each setting was set: every file and override that touched it, in the order in which they were merged."""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml

from llmtrain.config.schema import Key


@dataclass(frozen=True)
class Origin:
    """One place that set a key."""

    place: str
    """`conf/trainer/dpo.yaml:7`, or `override 'trainer.lr=1'`."""
    written: str
    """The value as it stands there."""
    file: Path | None
    """The file; None for an override."""
    comment: str = ""
    """What the file says beside it: the reason for the value, or its unit."""


@dataclass
class Origins:
    """For each key its origins, oldest first: the last one counts."""

    chains: dict[Key, list[Origin]] = field(default_factory=dict)
    choices: dict[str, list[Origin]] = field(default_factory=dict)
    """For each group of the defaults list, what chose its option."""

    def add_file(self, path: Path, package: Key) -> None:
        """Note every key of an option's file, which Hydra places under `package`, and each option that it chooses."""
        text = path.read_text(encoding="utf-8")
        node = _parsed(text)
        if isinstance(node, yaml.MappingNode):
            for key, name, value in [entry for entry in _entries(node, package) if entry[0] != (*package, "defaults")]:
                self._add(key, _origin(path, text, name, value))
            for name, value in _choices(node):
                if group := re.fullmatch(r"(?:override )? */?(\w+)", name.value):
                    self.choices.setdefault(group[1], []).append(_origin(path, text, name, value))

    def add_override(self, line: str, key: Key, value: Any) -> None:
        """Note an override of the command line, and each key inside its value."""
        self._add(key, Origin(f"override '{line}'", line.partition("=")[2], None))
        if isinstance(value, dict):
            for name, inner in value.items():
                self.add_override(line, (*key, str(name)), inner)

    def add_choice(self, line: str, group: str) -> None:
        """Note an override that chooses an option."""
        self.choices.setdefault(group, []).append(Origin(f"override '{line}'", line.partition("=")[2], None))

    def _add(self, key: Key, origin: Origin) -> None:
        self.chains.setdefault(key, []).append(origin)

    def last(self, key: Key) -> Origin | None:
        """What set `key`; where nothing did, what says the kind of its group, or set the nearest group around it."""
        for candidate in _nearest(key):
            if candidate in self.chains:
                return self.chains[candidate][-1]
        return None

    def place(self, key: Key) -> str | None:
        """The place of `last`."""
        origin = self.last(key)
        return origin.place if origin else None


def shown(path: Path) -> str:
    """The path as people write it: relative where it is inside the working directory."""
    here = Path.cwd()
    return str(path.relative_to(here)) if path.is_relative_to(here) else str(path)


@lru_cache(maxsize=256)
def _parsed(text: str) -> yaml.Node | None:
    return yaml.compose(text, yaml.SafeLoader)


def _nearest(key: Key) -> Iterator[Key]:
    yield key
    while key:
        key = key[:-1]
        yield (*key, "kind")
        yield key


def _origin(path: Path, text: str, name: yaml.Node, value: yaml.Node) -> Origin:
    line = name.start_mark.line
    after = ""
    if value.end_mark.line == line or value.start_mark.line > line:  # not in the middle of a value of several lines
        end = value.end_mark if value.end_mark.line == line else name.end_mark
        after = text.splitlines()[line][end.column :]
    comment = re.search(r"\s#\s*(.*)", after)
    written = text[value.start_mark.index : value.end_mark.index]
    return Origin(f"{shown(path)}:{line + 1}", written, path, comment[1].strip() if comment else "")


def _choices(node: yaml.MappingNode) -> Iterator[tuple[yaml.Node, yaml.Node]]:
    """Group and option of each entry of the defaults list that names a group."""
    for name, value in node.value:
        if name.value == "defaults" and isinstance(value, yaml.SequenceNode):
            for entry in value.value:
                if isinstance(entry, yaml.MappingNode):
                    yield from entry.value


def _entries(node: yaml.MappingNode, prefix: Key) -> Iterable[tuple[Key, yaml.Node, yaml.Node]]:
    """Key, name and value of every entry of a mapping, at any depth."""
    for name, value in node.value:
        key = (*prefix, str(name.value))
        yield key, name, value
        if isinstance(value, yaml.MappingNode):
            yield from _entries(value, key)
