"""What is wrong with a composed config: pydantic's errors in words, with the setting, its origin and the next step."""

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, TypeVar

from omegaconf.errors import InterpolationToMissingValueError
from pydantic import ValidationError

from llmtrain.config.base import Settings
from llmtrain.config.origins import Origins
from llmtrain.config.schema import Key, Setting, exists_in, key_of, lookup, setting_at, settings, variants, wanted
from llmtrain.config.suggest import closest, did_you_mean, where_listed

Root = TypeVar("Root", bound=Settings)
"""The class of a command's whole config."""


@dataclass(frozen=True)
class Problem:
    """One line for the user."""

    key: str
    text: str
    place: str | None = None

    def __str__(self) -> str:
        return (f"{self.key}: " if self.key else "") + self.text + (f" ({self.place})" if self.place else "")


def unheard_of(open_keys: list[Key], data: dict[str, Any], root: type[Settings]) -> list[Key]:
    """The open keys that are no setting of any kind, and no entry of a list."""
    known = {setting.key for setting in settings(root)}
    return [key for key in open_keys if key not in known and isinstance(lookup(data, key[:-1]), dict)]


def left_open(key: Key, data: dict[str, Any], origins: Origins, root: type[Settings]) -> Problem:
    """A setting that is `???` still."""
    setting = setting_at(key, data, root)
    name, words = ".".join(key), f", {wanted(setting.field)}" if setting else ""
    return Problem(name, f"must be given; add '{name}=...'{words}", origins.place(key))


def unresolvable(key: Key, error: Exception, origins: Origins) -> Problem | None:
    """A setting whose interpolation leads nowhere; None where another problem says why."""
    if isinstance(error, InterpolationToMissingValueError):
        return None  # the `???` that it points to is a problem of its own
    origin = origins.last(key)
    written = f"'{origin.written}' " if origin and "\n" not in origin.written else ""
    return Problem(".".join(key), f"{written}cannot be resolved: {str(error).splitlines()[0]}", origins.place(key))


def is_valid(data: dict[str, Any], root: type[Settings]) -> bool:
    """Whether the schemas have nothing to say against it."""
    try:
        root.model_validate_json(json.dumps(data, default=str))
    except ValidationError:
        return False
    return True


def validate(
    data: dict[str, Any],
    spoiled: set[Key],
    origins: Callable[[], Origins],
    groups: Iterable[str],
    root: type[Root],
) -> tuple[Root | None, list[Problem]]:
    """The config of class `root` that `data` means, and what is wrong with it; it counts only where nothing is wrong.

    One mistake must not hide another, so a misspelled key moves to where it was probably meant, a misspelled kind
    becomes the one that was, and `data` is looked at again. Keys in `spoiled` are reported already: nothing more is
    said about them.
    """
    problems: list[Problem] = []
    while True:
        try:
            return root.model_validate_json(json.dumps(data, default=str)), problems
        except ValidationError as error:
            mended, found = False, error.errors(include_url=False)
            misspelled = any(details["type"] == "extra_forbidden" for details in found)
            for details in found:
                key = key_of(details["loc"], root)
                if any(key[: len(known)] == known for known in spoiled):
                    continue
                match details["type"]:
                    case "extra_forbidden":
                        problems += _unknown(key, data, origins(), groups, root)
                        mended = True
                        continue
                    case "union_tag_invalid" | "union_tag_not_found":
                        problem, guess = _unknown_kind(key, data, origins(), root)
                        problems.append(problem)
                        if guess:
                            lookup(data, key)["kind"] = guess
                            mended = True
                            continue
                    case "missing" if misspelled:
                        continue  # it may be what was meant
                    case "missing":
                        problems.append(_missing(key, data, origins(), root))
                    case "value_error":
                        problems.append(_broken_rule(key, str(details["ctx"]["error"]), origins()))
                    case kind:
                        key = key if setting_at(key, data, root) else key[:-1]  # an entry of a list is no setting
                        problems.append(_wrong_value(key, details["input"], kind, data, origins(), root))
                spoiled = spoiled | {key}
            if not mended:
                return None, problems


def _unknown(
    key: Key, data: dict[str, Any], origins: Origins, groups: Iterable[str], root: type[Settings]
) -> list[Problem]:
    """One problem for each setting under an unknown key, which is taken out of `data` or moved to where it belongs."""
    value = lookup(data, key)
    del lookup(data, key[:-1])[key[-1]]
    here = {".".join(setting.key) for setting in settings(root) if exists_in(setting, data)}
    elsewhere = {".".join(setting.key): setting for setting in settings(root) if not exists_in(setting, data)}
    problems = []
    for leaf, content in _leaves(key, value):
        name = ".".join(leaf)
        if name in elsewhere and _of_the_old_kind(elsewhere[name], origins):
            continue
        guesses = closest(name, [*groups, *sorted(here), *sorted(elsewhere.keys() - here)])
        guesses = guesses or closest(leaf[-1], ["defaults"])  # which Hydra takes out of every file
        if name in elsewhere:
            others = [setting.kinds for setting in settings(root) if ".".join(setting.key) == name]
            differing = [[group for group, kind in kinds.items() if _kind(group, data) != kind] for kinds in others]
            nearest = min(differing, key=len)
            group = nearest[0]
            owners = dict.fromkeys(
                kinds[group] for kinds, groups in zip(others, differing, strict=True) if groups == nearest
            )
            text = f"no such setting with {group}={_kind(group, data)}; it belongs to {group}={' or '.join(owners)}"
        elif guesses or len(leaf) > 1:
            text = "no such setting" + (did_you_mean(guesses) or where_listed(name, here))
        else:
            text = f"no such setting or group; the groups are {', '.join(groups)}"
        problems.append(Problem(name, text, origins.place(leaf)))
        if len(guesses) == 1 and guesses[0] in here and name not in elsewhere and content != "???":
            target = tuple(guesses[0].split("."))
            parent, meant = lookup(data, target[:-1]), lookup(data, target)
            if isinstance(parent, dict) and (isinstance(content, dict) or not isinstance(meant, dict)):
                parent[target[-1]] = content
                origins.chains[target] = origins.chains.get(target, []) + origins.chains.get(leaf, [])
    return problems


def _of_the_old_kind(setting: Setting, origins: Origins) -> bool:
    """Whether only files set it, for the kind that they chose, and an override meant another kind."""
    kinds = [origins.last(tuple(group.split("."))) for group in setting.kinds]
    by_files = all(origin.file for origin in origins.chains.get(setting.key, []))
    return by_files and any(kind and not kind.file for kind in kinds)


def _kind(group: str, data: dict[str, Any]) -> Any:
    return lookup(data, tuple(group.split(".")))


def _leaves(key: Key, value: Any) -> list[tuple[Key, Any]]:
    if isinstance(value, dict) and value:
        return [leaf for name, inner in value.items() for leaf in _leaves((*key, name), inner)]
    return [(key, value)]


def _unknown_kind(key: Key, data: dict[str, Any], origins: Origins, root: type[Settings]) -> tuple[Problem, Any]:
    """What is wrong with a group's `kind`, or with the key that was meant to be it; and the kind that was meant."""
    setting = setting_at(key, data, root)
    assert setting is not None, f"pydantic found no kind for {key}, which is no group"
    group, known, name = lookup(data, key), list(variants(setting.field)), ".".join((*key, "kind"))
    if "kind" in group:
        guesses = closest(str(group["kind"]), known)
        text = f"got {_quoted(group['kind'])}, wants one of {', '.join(known)}" + did_you_mean(guesses)
        return Problem(name, text, origins.place((*key, "kind"))), guesses[0] if len(guesses) == 1 else None
    for other in group:
        if closest(other, ["kind"]):
            text, place = f"no such setting; did you mean '{name}'?", origins.place((*key, other))
            kind = group.pop(other)
            origins.chains[(*key, "kind")] = origins.chains.get((*key, other), [])
            return Problem(".".join((*key, other)), text, place), None if kind == "???" else kind
    return Problem(name, f"missing; add '{name}=...', one of {', '.join(known)}", origins.place(key)), None


def _missing(key: Key, data: dict[str, Any], origins: Origins, root: type[Settings]) -> Problem:
    setting = setting_at(key, data, root)
    assert setting is not None, f"pydantic misses {key}, which no schema has"
    name = ".".join(key)
    if len(key) == 1 and variants(setting.field):
        return Problem(name, f"missing; add '+{name}=OPTION', or '- {name}: OPTION' to the defaults list")
    return Problem(name, f"missing; add '{name}=...', {wanted(setting.field)}", origins.place(key))


def _broken_rule(key: Key, message: str, origins: Origins) -> Problem:
    """A rule across settings: its message says what to change, and its place is that of each setting it names."""
    words = [word.strip(".,;:") for word in message.replace("=", " ").split()]
    named = [(*key, *word.split(".")) for word in words] + [tuple(word.split(".")) for word in words]
    leaves = [name for name in dict.fromkeys(named) if name in origins.chains and (*name, "kind") not in origins.chains]
    places = dict.fromkeys(origins.chains[name][-1].place for name in leaves)
    return Problem(".".join(key), message, ", ".join(places) or None)


def _wrong_value(
    key: Key, value: Any, error: str, data: dict[str, Any], origins: Origins, root: type[Settings]
) -> Problem:
    setting = setting_at(key, data, root)
    assert setting is not None, f"pydantic refuses {key}, which no schema has"
    name, words, groups = ".".join(key), wanted(setting.field), variants(setting.field)
    if error == "finite_number":
        words = words.replace("a number", "a finite number")
    place = origins.place(_leaves(key, value)[0][0])  # of `trainer.lr.x=1`, where `trainer.lr` holds a number
    hint = ""
    if isinstance(value, float) and value.is_integer() and words.startswith("a whole number"):
        hint = f"; write {int(value)}"
    elif isinstance(value, int | float) and words.startswith("text"):
        hint = f"; write '{name}=\"{value}\"'"
    elif isinstance(value, int | float) and words.startswith("a list of text"):
        hint = f'; put each in quotes: "{value}"'
    elif isinstance(value, str) and words.startswith("a list"):
        hint = f"; write '{name}=[{value}]'"
    elif isinstance(value, str) and value in groups:
        hint = f"; write '{name}.kind={value}'"
    elif words.startswith("one of"):
        hint = did_you_mean(closest(str(value), words.removeprefix("one of ").split(", ")))
    return Problem(name, f"got {_quoted(value)}, wants {words}{hint}", place)


def _quoted(value: Any) -> str:
    if isinstance(value, str):
        return f"'{value}'"
    return repr(value) if isinstance(value, float) else json.dumps(value)
