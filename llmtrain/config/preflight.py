"""The command line's overrides, looked at one by one before Hydra, which would stop at the first bad one."""

from dataclasses import dataclass, field
from itertools import product

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, OverrideType, ValueType
from hydra.errors import HydraException

from llmtrain.config.base import Settings
from llmtrain.config.problems import Problem
from llmtrain.config.roots import owner_of
from llmtrain.config.schema import Key
from llmtrain.config.suggest import closest, did_you_mean


@dataclass(frozen=True)
class Groups:
    """What the search path offers."""

    options: dict[str, list[str]]
    """The options of each group."""
    bases: dict[str, list[str]]
    """The files of each group that options inherit and nobody chooses: `_base`."""
    chosen: set[str]
    """The groups of the defaults list."""


@dataclass(frozen=True)
class Given:
    """One override: as typed, as parsed, and as Hydra gets it."""

    line: str
    override: Override
    composed: str

    @property
    def adds(self) -> bool:
        """Whether it asks for a new key: `+key=value`."""
        return self.line.startswith("+") and not self.line.startswith("++") and self.composed.startswith("++")

    @property
    def place(self) -> str:
        """For the end of a message."""
        return f"override '{self.line}'"

    @property
    def key(self) -> Key:
        """The setting or group that it changes."""
        return tuple(self.override.key_or_group.replace("/", ".").split("."))


@dataclass
class CommandLine:
    """The overrides that can be composed, what is wrong with the others, and the keys that need no more said."""

    given: list[Given] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    spoiled: set[Key] = field(default_factory=set)


def read_overrides(lines: list[str], groups: Groups, root: type[Settings]) -> CommandLine:
    """Check each override on its own; one whose meaning can be guessed is composed so, to hide nothing else."""
    result = CommandLine()
    for line in lines:
        parsed = parse(line)
        if isinstance(parsed, Problem):
            result.problems.append(parsed)
            result.spoiled.add(tuple(parsed.key.split(".")))
            continue
        check = _choice if is_choice(parsed, groups) else _value
        problems, composed = check(parsed, line, groups, root)
        result.problems += problems
        if composed is None:
            result.spoiled.add(tuple(parsed.key_or_group.split(".")))
        else:
            again = parse(composed)
            assert isinstance(again, Override), f"the rewritten override {composed!r} does not parse"
            result.given.append(Given(line, again, composed))
    return result


def parse(line: str) -> Override | Problem:
    """The override that `line` means, by Hydra's grammar."""
    key, equals, _ = line.partition("=")
    name = key.lstrip("+~")
    if not equals and not line.startswith("~"):
        return Problem(line, f"not an override: write '{line}=VALUE'")
    try:
        override = OverridesParser.create().parse_rule(line, "override")
    except HydraException as error:
        reason = str(error).splitlines()[0]
        if "expecting" in reason:
            reason = reason[: reason.index(" expecting")]
        return Problem(
            name, f"does not parse: {reason}; quote special characters: '{name}=\"VALUE\"'", f"override '{line}'"
        )
    assert isinstance(override, Override)
    if not override.key_or_group:
        return Problem(line, f"not an override: write 'KEY{line}'")
    return override


def is_choice(override: Override, groups: Groups) -> bool:
    """Whether it chooses an option of a group, and does not set a value."""
    return override.key_or_group in groups.options and not isinstance(override.value(), dict)


def _choice(override: Override, line: str, groups: Groups, root: type[Settings]) -> tuple[list[Problem], str | None]:
    group, place = override.key_or_group, f"override '{line}'"
    known = groups.options[group]
    one_of = f" Options: {', '.join(known)}"
    needed = group in root.model_fields
    if override.package is not None:
        return [
            Problem(group, f"its place is fixed; write '{group}=OPTION' without '@{override.package}'", place)
        ], None
    if override.is_delete() or override.value() is None:
        return ([Problem(group, f"a run needs one.{one_of}", place)], None) if needed else ([], line)
    problems = []
    value = override.value()
    if override.is_sweep_override():
        problems.append(_sweep(override, line))
        if not override.is_discrete_sweep() or override.value_type == ValueType.GLOB_CHOICE_SWEEP:
            return problems, None
        value = next(iter(override.sweep_string_iterator()), None)
    names = []
    for name in map(str, value if isinstance(value, list) else [value]):
        if name in known:
            names.append(name)
            continue
        guesses = closest(name, known)
        problems.append(Problem(group, f"no option '{name}'" + (did_you_mean(guesses) or ".") + one_of, place))
        if len(guesses) != 1:
            return problems, None
        names += guesses
    sign = "" if group in groups.chosen else "+"
    composed = f"{sign}{group}={names[0] if len(names) == 1 else '[' + ','.join(names) + ']'}"
    typed = {OverrideType.ADD: "+", OverrideType.FORCE_ADD: "++"}.get(override.type, "")
    if typed != sign and not problems:
        problems.append(Problem(group, f"write '{composed}'", place))
    return problems, composed


def _value(override: Override, line: str, groups: Groups, root: type[Settings]) -> tuple[list[Problem], str | None]:
    key, place = override.key_or_group, f"override '{line}'"
    if override.is_hydra_override():
        if key == "hydra.searchpath":
            return [], line
        return [Problem(key, "has no effect: llmtrain only composes with Hydra; for a sweep add -m", place)], None
    if "/" in key or override.package is not None:
        guesses = closest(key, groups.options)
        return [
            Problem(key, f"no such group{did_you_mean(guesses)}; the groups are {', '.join(groups.options)}", place)
        ], None
    if override.is_delete():
        return [Problem(key, f"cannot be left out; write '{key}=VALUE'", place)], None
    if override.is_sweep_override():
        return [_sweep(override, line)], None
    if "." not in key and (owner := owner_of(key, root)) is not None:
        return [Problem(key, f"is a group of `{owner}`, which this command does not have", place)], None
    if "." not in key and key not in root.model_fields:
        guesses = closest(key, [*groups.options, *root.model_fields])
        if len(guesses) == 1 and guesses[0] in groups.options and not isinstance(override.value(), dict):
            problem = Problem(key, f"no such group{did_you_mean(guesses)}", place)
            meant = parse(f"{guesses[0]}={line.partition('=')[2]}")
            assert isinstance(meant, Override), f"the value of {line!r} parses under one name and not under another"
            problems, composed = _choice(meant, line, groups, root)
            return [problem, *problems], composed
    return [], "++" + line.lstrip("+")  # `++` sets unknown keys too: the schema names all of them at once


def _sweep(override: Override, line: str) -> Problem:
    key, value = override.key_or_group, line.partition("=")[2]
    text = "several values are a sweep: add -m"
    if override.value_type == ValueType.SIMPLE_CHOICE_SWEEP and "." in key:
        text += f", or write a list '{key}=[{value}]' or one text '{key}=\"{value}\"'"
    return Problem(key, text, f"override '{line}'")


def expand(lines: list[str], groups: Groups) -> tuple[list[list[str]], list[Problem]]:
    """The overrides of each run of a sweep, and what is wrong with the sweep itself.

    The order is that of Hydra's BasicSweeper: the last override changes fastest, a key given again replaces its values.
    An override that does not parse is left in: whoever composes the point reports it.
    """
    values: dict[str, list[str]] = {}
    problems = []
    for line in lines:
        override = parse(line)
        if isinstance(override, Problem):
            values[line] = [line]
        elif not override.is_sweep_override():
            values[override.get_key_element()] = [line]
        elif override.is_discrete_sweep():
            key = override.get_key_element()
            values[key] = [f"{key}={value}" for value in swept(override, groups)]
            if not values[key]:
                problems.append(Problem(key, "the sweep has no values", f"override '{line}'"))
        else:
            text = (
                "a grid cannot try every number of an interval; write choice(...) or range(...), "
                "or search it: sweep=tpe or sweep=asha"
            )
            problems.append(Problem(override.key_or_group, text, f"override '{line}'"))
    return [list(point) for point in product(*values.values())], problems


def swept(override: Override, groups: Groups) -> list[str]:
    """The values of a sweep that has some, each as it is typed."""
    if override.value_type == ValueType.GLOB_CHOICE_SWEEP:
        names: list[str] = override._value.filter(groups.options.get(override.key_or_group, []))
        return names
    return list(override.sweep_string_iterator())
