"""Every name in conf/ misspelt by one letter is refused, and the answer names the right one.

A name is misspelt in four ways: one letter dropped, doubled, swapped with its neighbour, replaced. Where that can be,
many mistakes stand in one composition, which also shows that none hides another; the campaign makes each alone.
"""

import json
import random
import re
import shutil
import string
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import product, zip_longest
from pathlib import Path

import pytest
import yaml
from yaml.nodes import MappingNode, Node, ScalarNode

from llmtrain.config.compose import Composer
from llmtrain.config.options import conf_directory, options
from llmtrain.config.root import TrainConfig
from llmtrain.config.roots import ROOTS
from llmtrain.config.schema import Setting, exists_in, lookup, settings, variants

CONF = conf_directory()
ELSEWHERE = ("optimise", "serving")
"""Groups of other commands than train, whose defaults lists have their names or are serve.yaml."""
EVERY_OPTION = options([CONF])
OPTIONS = {group: files for group, files in EVERY_OPTION.items() if group not in ELSEWHERE}
FILES = {
    path
    for path in CONF.rglob("*.yaml")
    if path.parent.name not in ELSEWHERE and path.stem not in ("optimisation", "serve")
}
WAYS = ("dropped", "doubled", "swapped", "replaced")
SETTINGS = list(settings())
KINDS = {kind for one in SETTINGS for kind in variants(one.field) if kind}
"""A misspelt one may be another."""
VALID = {".".join(setting.key) for setting in SETTINGS} | {path.stem for path in CONF.rglob("*")}


@dataclass(frozen=True)
class Mistake:
    """The answer must be about `key`, and its first guess must be `meant`; where `key` is empty, the mistake is in a
    defaults list, and the answer may be about anything and guess `meant` second (`guesses` says why)."""

    key: str
    meant: str


@dataclass
class Score:
    """How many mistakes were answered with the right name; which were not, and which were not refused."""

    right: int = 0
    missed: list[str] = field(default_factory=list)
    accepted: list[str] = field(default_factory=list)

    def judge(self, composer: Composer, line: list[str], mistakes: list[Mistake]) -> None:
        """Compose `line` and look for the answer to each mistake in it, or in the files that it chooses."""
        problems = composer.check(line).problems if mistakes else []
        for mistake in mistakes:
            texts = [problem.text for problem in problems if mistake.key in ("", problem.key)]
            if any(mistake.meant in guesses(text)[: 1 if mistake.key else 2] for text in texts):
                self.right += 1
            else:
                (self.missed if texts else self.accepted).append(f"{mistake} by {line}: {texts}")

    def assert_good(self, at_least: int) -> None:
        count = self.right + len(self.missed) + len(self.accepted)
        print(f"{self.right} of {count} mistakes got the right name", *self.missed, sep="\n  ")
        assert self.accepted == []
        assert count >= at_least
        assert self.right / count >= 0.95


def guesses(text: str) -> list[str]:
    """The names that an answer offers, the nearest first; where a setting can have one value only, that one. In a
    defaults list `dpo` and `_dpo` are often equally near: either may come first."""
    if offered := re.search(r"did you mean ([^?]*)\?", text):
        return re.findall(r"'([^']*)'", offered[1])
    return re.findall(r"wants (\w+)$", text)


def misspelt(word: str, way: str, seed: int = 0) -> str:
    """`word` with one letter wrong; the place is drawn, the same one every time."""
    rng = random.Random(f"{word} {way} {seed}")
    places = [place for place, letter in enumerate(word) if letter != "."]
    if way == "swapped":
        places = [place for place in places[:-1] if word[place + 1] not in (".", word[place])]
    place = rng.choice(places)
    before, letter, after = word[:place], word[place], word[place + 1 :]
    other = rng.choice([other for other in string.ascii_lowercase if other != letter])
    return {
        "dropped": before + after,
        "doubled": before + letter + letter + after,
        "swapped": before + after[:1] + letter + after[1:],
        "replaced": before + other + after,
    }[way]


# on the command line


@pytest.fixture(scope="module")
def composer() -> Composer:
    return Composer(files_stay=True)


def values(composer: Composer) -> Iterator[tuple[list[str], dict[str, str]]]:
    """Command lines, each with the settings that no line before it has, as they would be typed."""
    seen: set[str] = set()
    every = settings(composer.root)
    named = [] if composer.root is TrainConfig else ["version=chat"]
    chosen = [[f"{group}={option}"] for group, files in EVERY_OPTION.items() for option in files
              if group == "experiment" or group in composer.root.model_fields]  # fmt: skip
    for line in [named, *([*named, *choice] for choice in chosen)]:
        data = composer.check(line).data
        here = [one for one in every if not variants(one.field) and exists_in(one, data)]
        found = {".".join(one.key): json.dumps(lookup(data, one.key) or "x") for one in here}
        yield line, {name: value for name, value in found.items() if name not in seen}
        seen |= found.keys()
    assert {".".join(one.key) for one in every if not variants(one.field)} == seen


def judge_keys(score: Score, composer: Composer, seed: int, together: bool) -> None:
    """Misspell every setting on the command line."""
    for (line, found), way in product(list(values(composer)), WAYS):
        wrong = {misspelt(name, way, seed): name for name in found}
        typed = [(f"{key}={found[name]}", Mistake(key, name)) for key, name in wrong.items() if key not in VALID]
        for some in [typed] if together else [[one] for one in typed]:
            score.judge(composer, [*line, *(override for override, _ in some)], [mistake for _, mistake in some])


def test_keys_on_the_command_line(composer: Composer):
    score = Score()
    judge_keys(score, composer, seed=0, together=True)
    score.assert_good(at_least=250)


@pytest.mark.parametrize("name", ["serve", "optimisation"])
def test_keys_of_the_commands_about_a_model(name: str):
    score = Score()
    judge_keys(score, Composer((), name, files_stay=True, root=ROOTS[name]), seed=0, together=True)
    score.assert_good(at_least=150)


def test_options_on_the_command_line(composer: Composer):
    score = Score()
    columns = [[(group, option) for option in files] for group, files in OPTIONS.items()]
    for chosen, way in product(zip_longest(*columns), WAYS):
        wrong = [(group, option, misspelt(option, way)) for group, option in filter(None, chosen)]
        wrong = [(group, option, typed) for group, option, typed in wrong if typed not in OPTIONS[group]]
        line = [f"{group}={typed}" for group, _, typed in wrong]
        score.judge(composer, line, [Mistake(group, option) for group, option, _ in wrong])
    score.assert_good(at_least=70)


def test_groups_on_the_command_line(composer: Composer):
    score = Score()
    for way, seed in product(WAYS, range(3)):
        wrong = {misspelt(group, way, seed): group for group in OPTIONS}
        line = [f"{typed}={next(iter(OPTIONS[group]))}" for typed, group in wrong.items()]
        score.judge(composer, line, [Mistake(typed, group) for typed, group in wrong.items()])
    score.assert_good(at_least=60)


def test_kinds_on_the_command_line(composer: Composer):
    score = Score()
    for depth in (1, 2):
        groups = {one.key: one for one in SETTINGS if variants(one.field) and len(one.key) == depth}
        columns = [[(one, kind) for kind in variants(one.field) if kind] for one in groups.values()]
        for chosen, way in product(zip_longest(*columns), WAYS):
            bundles: dict[tuple[tuple[str, str], ...], list[tuple[Setting, str]]] = {}
            for one, kind in filter(None, chosen):  # together what can stand together
                if misspelt(kind, way) not in KINDS:
                    bundles.setdefault(tuple(one.kinds.items()), []).append((one, kind))
            for around, wrong in bundles.items():
                typed = [f"{'.'.join(one.key)}.kind={misspelt(kind, way)}" for one, kind in wrong]
                mistakes = [Mistake(f"{'.'.join(one.key)}.kind", kind) for one, kind in wrong]
                score.judge(composer, [*(f"{group}={kind}" for group, kind in around), *typed], mistakes)
    score.assert_good(at_least=60)


# in files


@pytest.fixture(scope="module")
def lines(composer: Composer) -> dict[Path, list[str]]:
    """For each file of conf/ a command line that it is part of: the defaults, or with few others that choose anew."""
    found: dict[Path, list[str]] = {}
    files_of: dict[tuple[str, ...], set[Path]] = {}
    for line in [[], *([f"{group}={option}"] for group, files in OPTIONS.items() for option in files)]:
        composer.check(line)
        files_of[tuple(line)] = {path for path, _ in composer.loader.merged}
    for line, files in sorted(files_of.items(), key=lambda one: (one[0] != (), len(one[1]))):
        for path in sorted(files):
            found.setdefault(path, list(line))
    own = {path: [f"{group}={option}"] for group, files in OPTIONS.items() for option, path in files.items()}
    found |= {path: line for path, line in own.items() if path in found}  # what another file chooses anew stays unseen
    assert found.keys() == FILES
    return found


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(shutil.copytree(CONF, tmp_path_factory.mktemp("copy") / "conf"))


@pytest.fixture(scope="module")
def composer_of_copy(copy: Path) -> Composer:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("llmtrain.config.compose.conf_directory", lambda: copy)
        return Composer()


Edit = tuple[Node, str, list[Mistake]]
"""What is replaced in a file, by what, and the answers that this deserves."""


def entries(node: Node, prefix: str) -> Iterator[tuple[str, ScalarNode, Node]]:
    """Dotted name, key and value of every entry of a file but its defaults list and what is Hydra's."""
    for key, value in node.value if isinstance(node, MappingNode) else []:
        if key.value not in ("defaults", "hydra"):
            yield prefix + key.value, key, value
            yield from entries(value, f"{prefix}{key.value}.")


def settings_of(path: Path) -> list[tuple[str, ScalarNode, Node]]:
    """The entries of an option's file, by their names in the config."""
    whole = path.parent == CONF or path.read_text().startswith("# @package _global_")
    return list(entries(yaml.compose(path.read_text()), "" if whole else f"{path.parent.name}."))


def edits_of_keys(path: Path, way: str, seed: int) -> Iterator[Edit]:
    """Each key that holds a value."""
    for name, key, value in settings_of(path):
        wrong = misspelt(key.value, way, seed)
        there = name.removesuffix(key.value) + wrong
        if not isinstance(value, MappingNode) and there not in VALID:
            yield key, wrong, [Mistake(there, name)]


def edits_of_groups(path: Path, way: str, seed: int, depth: int) -> Iterator[Edit]:
    """Each key with `depth` others around it that holds a mapping: every key inside is in the wrong place then."""
    for name, key, value in settings_of(path):
        if isinstance(value, MappingNode) and name.count(".") == depth:
            wrong = misspelt(key.value, way, seed)
            there = name.removesuffix(key.value) + wrong
            inside = [inner for inner, _, leaf in entries(value, "") if not isinstance(leaf, MappingNode)]
            yield key, wrong, [Mistake(f"{there}.{inner}", f"{name}.{inner}") for inner in inside]


def edits_of_kinds(path: Path, way: str, seed: int) -> Iterator[Edit]:
    """Each value of a `kind`."""
    for name, key, value in settings_of(path):
        if key.value == "kind" and value.value != "???" and (wrong := misspelt(value.value, way, seed)) not in KINDS:
            yield value, wrong, [Mistake(name, value.value)]


def edits_of_defaults(path: Path, way: str, seed: int) -> Iterator[Edit]:
    """Each group and each file of the defaults list, but for what is interpolated and what is Hydra's."""
    for name, value in yaml.compose(path.read_text()).value:
        for entry in value.value if name.value == "defaults" else []:
            for node in entry.value[0] if isinstance(entry, MappingNode) else [entry]:
                if named := re.fullmatch(r"((?:override )?/?)(?!_self_|null)(\w+)", node.value):
                    wrong = misspelt(named[2], way, seed)
                    if wrong not in VALID:
                        yield node, named[1] + wrong, [Mistake("", named[2])]


def edited(path: Path, edits: list[Edit]) -> str:
    text = path.read_text()
    for node, wrong, _ in sorted(edits, key=lambda edit: edit[0].start_mark.index, reverse=True):
        text = text[: node.start_mark.index] + wrong + text[node.end_mark.index :]
    return text


def judge_edits(
    score: Score, composer: Composer, copy: Path, path: Path, line: list[str], bundles: list[list[Edit]]
) -> None:
    """Compose the copy of conf/ with each bundle of mistakes in one of its files."""
    place = copy / path.relative_to(CONF)
    for edits in filter(None, bundles):
        place.write_text(edited(path, edits))
        score.judge(composer, line, [mistake for _, _, mistakes in edits for mistake in mistakes])
    shutil.copy(path, place)


KEYS = (edits_of_keys, partial(edits_of_groups, depth=0), partial(edits_of_groups, depth=1))
"""Mistakes of which many can stand in one file: of the keys around a key only one is misspelt."""


def test_no_group_is_deeper_than_those_that_are_misspelt():
    depths = {name.count(".") for path in FILES for name, _, value in settings_of(path) if value.id == "mapping"}
    assert depths == {0, 1}


def test_keys_in_files(composer_of_copy: Composer, copy: Path, lines: dict[Path, list[str]]):
    score = Score()
    for number, (path, line) in enumerate(lines.items()):  # one way a file and sort: the campaign makes each
        bundles = [list(find(path, WAYS[(number + turn) % 4], 0)) for turn, find in enumerate(KEYS)]
        judge_edits(score, composer_of_copy, copy, path, line, bundles)
    score.assert_good(at_least=250)


def test_kinds_and_defaults_lists_in_files(composer_of_copy: Composer, copy: Path, lines: dict[Path, list[str]]):
    score = Score()
    for number, (path, line) in enumerate(lines.items()):  # one way a file: of a list Hydra tells the first mistake
        way = WAYS[number % 4]
        bundles = [list(edits_of_kinds(path, way, 0)), *([edit] for edit in edits_of_defaults(path, way, 0))]
        judge_edits(score, composer_of_copy, copy, path, line, bundles)
    score.assert_good(at_least=55)


@pytest.mark.campaign
@pytest.mark.parametrize("seed", [1, 2])
def test_each_mistake_alone(composer_of_copy: Composer, copy: Path, lines: dict[Path, list[str]], seed: int):
    score = Score()
    judge_keys(score, composer_of_copy, seed, together=False)
    for (path, line), find, way in product(lines.items(), (*KEYS, edits_of_kinds, edits_of_defaults), WAYS):
        judge_edits(score, composer_of_copy, copy, path, line, [[edit] for edit in find(path, way, seed)])
    score.assert_good(at_least=1500)
