"""The schemas as data: which settings there are, of which kind, and what each wants, in words."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt, MinLen
from pydantic.fields import FieldInfo

from llmtrain.config.base import Settings
from llmtrain.config.root import TrainConfig

Key = tuple[str, ...]
"""`trainer.lr` as ("trainer", "lr")."""
ONLY = ""
"""The kind of a group that has one kind only, without a name."""


@dataclass(frozen=True)
class Setting:
    """One field of the schemas. `kinds` says under which circumstances it exists: {"trainer.kind": "dpo"}."""

    key: Key
    field: FieldInfo
    kinds: dict[str, str]


@cache
def settings(root: type[Settings] = TrainConfig) -> tuple[Setting, ...]:
    """Every setting of a command's config, groups included, parents first; one that several kinds share comes once for
    each."""
    return tuple(_settings(root, (), {}))


def _settings(model: type[Settings], key: Key, kinds: dict[str, str]) -> Iterator[Setting]:
    for name, field in model.model_fields.items():
        here = (*key, name)
        yield Setting(here, field, kinds)
        groups = variants(field)
        for kind, group in groups.items():
            yield from _settings(group, here, {**kinds, ".".join((*here, "kind")): kind} if len(groups) > 1 else kinds)


def variants(field: FieldInfo) -> dict[str, type[Settings]]:
    """The groups of settings that `field` may hold, by their `kind`, or under `ONLY`;
    empty where it holds a plain value."""
    choices = [field.annotation, *get_args(field.annotation)]
    groups = [choice for choice in choices if isinstance(choice, type) and issubclass(choice, Settings)]
    if len(groups) == 1 and "kind" not in groups[0].model_fields:
        return {ONLY: groups[0]}
    return {get_args(group.model_fields["kind"].annotation)[0]: group for group in groups}


def key_of(location: tuple[int | str, ...], root: type[Settings] = TrainConfig) -> Key:
    """The setting that pydantic's `loc` means: without the kind that it puts after a group of several kinds."""
    key: Key = ()
    model: type[Settings] | None = root
    parts = list(location)
    while parts:
        name = str(parts.pop(0))
        key = (*key, name)
        field = model.model_fields.get(name) if model else None
        model = None
        if field and (groups := variants(field)):
            kind = str(parts.pop(0)) if len(groups) > 1 and parts else next(iter(groups))
            model = groups[kind]
    return key


def setting_at(key: Key, data: dict[str, Any], root: type[Settings] = TrainConfig) -> Setting | None:
    """The setting of that name, for the kinds that `data` has chosen."""
    return next((setting for setting in _named(root).get(key, ()) if exists_in(setting, data)), None)


@cache
def _named(root: type[Settings]) -> dict[Key, list[Setting]]:
    every = settings(root)
    return {key: [one for one in every if one.key == key] for key in {one.key for one in every}}


def exists_in(setting: Setting, data: dict[str, Any]) -> bool:
    """Whether the kinds that `setting` belongs to are those of `data`."""
    return all(lookup(data, tuple(name.split("."))) == kind for name, kind in setting.kinds.items())


def lookup(data: Any, key: Key) -> Any:
    """The value under `key` in nested dictionaries, or None."""
    for part in key:
        data = data.get(part) if isinstance(data, dict) else None
    return data


def choices(annotation: Any) -> list[str]:
    """The values that a setting of that annotation may have, where they can be counted: literals, true, false, null."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return [str(argument) for argument in arguments]
    if origin in (Union, UnionType):
        return [choice for argument in arguments for choice in choices(argument)]
    return {bool: ["true", "false"], type(None): ["null"]}.get(annotation, [])


def wanted(field: FieldInfo) -> str:
    """What `field` accepts, in words: `a whole number > 0`, `one of fp32, bf16`."""
    if groups := variants(field):
        return "a group of settings" + (f" with kind: {', '.join(groups)}" if ONLY not in groups else "")
    return _words(field.annotation, field.metadata)


def _words(annotation: Any, limits: list[Any]) -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _words(arguments[0], list(arguments[1:]))
    if origin in (Union, UnionType):
        return " or ".join(_words(argument, limits) for argument in arguments)
    if origin is Literal:
        return ("one of " if len(arguments) > 1 else "") + ", ".join(map(str, arguments))
    if origin is tuple:
        return f"a list of {_words(arguments[0], [])}" + (" with at least one entry" if MinLen(1) in limits else "")
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "text", type(None): "null"}
    bounds = []
    for limit in limits if annotation in (int, float) else []:
        match limit:
            case Gt(bound):
                bounds.append(f"> {bound}")
            case Ge(bound):
                bounds.append(f">= {bound}")
            case Lt(bound):
                bounds.append(f"< {bound}")
            case Le(bound):
                bounds.append(f"<= {bound}")
    return " ".join([names[annotation], " and ".join(bounds)]).strip()
