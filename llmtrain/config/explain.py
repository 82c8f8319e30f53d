"""What a setting is, what it may be, what a change of it changes, and every place that set it."""

import json
from dataclasses import dataclass
from inspect import cleandoc
from pathlib import Path
from typing import Any

from llmtrain.config.base import Changes, Settings
from llmtrain.config.compose import Checked
from llmtrain.config.options import description
from llmtrain.config.origins import Origin
from llmtrain.config.schema import ONLY, Key, Setting, exists_in, lookup, setting_at, settings, variants, wanted
from llmtrain.config.suggest import closest, did_you_mean, where_listed
from llmtrain.errors import ConfigError

EFFECTS = {
    Changes.MATHEMATICS: "the mathematics: another value is another run",
    Changes.DATA: "the prepared data: another run where their content differs",
    Changes.PERFORMANCE: "time and memory only: the same run",
    Changes.SURFACE: "names, places or what is shown: the same run",
}
"""What another value does, in words."""


@dataclass(frozen=True)
class Explanation:
    """One setting, or one group of them."""

    key: str
    value: Any
    """Resolved; `???` where it must be given, null where `only_with` says that it does not exist here."""
    meaning: str
    wants: str
    changes: str | None
    """Empty for a group."""
    only_with: str | None
    """The kind that has this setting, where the config has chosen another."""
    origins: list[Origin]
    """What set it, newest first: the first one counts."""
    inside: "list[Explanation]"
    """Every setting of a group, at any depth."""


def explain(name: str, checked: Checked[Settings], options: dict[str, dict[str, Path]]) -> Explanation:
    """The setting or the group called `name` in a config that was composed, whatever else is wrong with it.

    `options` has the file of each option of each group. Raises ConfigError where no setting has that name.
    """
    key = tuple(name.split("."))
    if name in options:
        return _choice(name, checked, options[name])
    if setting := setting_at(key, checked.data, checked.root):
        return _explanation(setting, checked)
    if others := [setting for setting in settings(checked.root) if setting.key == key]:
        return _of_another_kind(others, checked)
    names = dict.fromkeys(".".join(setting.key) for setting in settings(checked.root))
    guess = did_you_mean(closest(name, [*options, *names]))
    raise ConfigError([f"{name}: no such setting{guess or where_listed(name, names)}"])


def explain_all(checked: Checked[Settings]) -> list[Explanation]:
    """Every setting that the config has, groups left out."""
    return _inside((), checked)


def _explanation(setting: Setting, checked: Checked[Settings]) -> Explanation:
    key, groups = setting.key, variants(setting.field)
    value = _value(key, checked)
    parent = setting_at(key[:-1], checked.data, checked.root)
    if groups:
        value = lookup(checked.data, (*key, "kind")) or ONLY
        meaning = _meaning_of_kind(groups, value)
    elif parent and key[-1] == "kind":
        meaning = _meaning_of_kind(variants(parent.field), value)
    else:
        meaning = setting.field.description or ""
    chain = checked.origins().chains.get(key, [])
    wants = f"one of {', '.join(variants(parent.field))}" if parent and key[-1] == "kind" else wanted(setting.field)
    inside = _inside(key, checked) if groups else []
    return Explanation(".".join(key), value, meaning, wants, _changes(setting), None, chain[::-1], inside)


def _choice(group: str, checked: Checked[Settings], files: dict[str, Path]) -> Explanation:
    """A group of the command line, whose value is the name of the chosen option."""
    choices = checked.composed.hydra.runtime.choices if checked.composed else {}
    chosen = choices.get(group)
    meaning = description(files[chosen]) if chosen in files else ""
    chain, wants = checked.origins().choices.get(group, []), f"one of {', '.join(files)}"
    return Explanation(group, chosen, meaning, wants, None, None, chain[::-1], _inside((group,), checked))


def _of_another_kind(others: list[Setting], checked: Checked[Settings]) -> Explanation:
    first = others[0]
    chosen = {group: lookup(checked.data, tuple(group.split("."))) for one in others for group in one.kinds}
    missing = [[f"{group}={kind}" for group, kind in one.kinds.items() if chosen[group] != kind] for one in others]
    nearest = min(map(len, missing))
    only_with = " or ".join(" and ".join(kinds) for kinds in missing if len(kinds) == nearest)
    meaning, wants = first.field.description or "", wanted(first.field)
    return Explanation(".".join(first.key), None, meaning, wants, _changes(first), only_with, [], [])


def _inside(key: Key, checked: Checked[Settings]) -> list[Explanation]:
    return [
        _explanation(setting, checked)
        for setting in settings(checked.root)
        if setting.key[: len(key)] == key and exists_in(setting, checked.data) and not variants(setting.field)
    ]


def _meaning_of_kind(groups: dict[str, Any], kind: Any) -> str:
    return cleandoc(groups[kind].__doc__ or "") if kind in groups else ""


def _value(key: Key, checked: Checked[Settings]) -> Any:
    parent = lookup(checked.data, key[:-1])
    if isinstance(parent, dict) and key[-1] in parent:
        return parent[key[-1]]
    chain = checked.origins().chains.get(key)
    return chain[-1].written if chain else "???"


def _changes(setting: Setting) -> str | None:
    return next((EFFECTS[item] for item in setting.field.metadata if isinstance(item, Changes)), None)


def paragraph(found: Explanation) -> str:
    """An explanation for people: the value first, what set it last, the newest place first."""
    value = f"exists only with {found.only_with}" if found.only_with else f"= {_shown(found.value)}"
    lines = [f"{found.key} {value}", *(f"  {line}" for line in found.meaning.splitlines())]
    lines.append(f"  wants    {found.wants}")
    if found.changes:
        lines.append(f"  changes  {found.changes}")
    labels = ["set by ", "before", *("" for _ in found.origins)]
    rows = [[label, origin.place, *_written(origin)] for label, origin in zip(labels, found.origins, strict=False)]
    return "\n".join(lines + [f"  {row}" for row in _aligned(rows)])


def table(found: list[Explanation]) -> str:
    """One line for each setting: its name, its value, the place that set it."""
    rows = [[one.key, _shown(one.value), one.origins[0].place if one.origins else ""] for one in found]
    return "\n".join(f"  {row}" for row in _aligned(rows))


def _aligned(rows: list[list[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(f"{cell:{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _written(origin: Origin) -> list[str]:
    """What stands there, if it is one line, and the comment beside it."""
    return ["..." if "\n" in origin.written else origin.written, f"# {origin.comment}" if origin.comment else ""]


def _shown(value: Any) -> str:
    if value == "???":
        return "??? (must be given)"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def as_data(found: Explanation) -> dict[str, Any]:
    """An explanation for machines: plain data, the same names."""
    data = {name: value for name, value in vars(found).items() if name not in ("origins", "inside")}
    origins = [
        {"place": origin.place, "written": origin.written, "comment": origin.comment} for origin in found.origins
    ]
    return {**data, "origins": origins, "inside": [as_data(one) for one in found.inside]}
