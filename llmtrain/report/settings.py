"""The config of a run as people read it: each setting with its meaning, and what it would have been by default."""

from dataclasses import dataclass
from functools import cache
from pathlib import PurePath
from typing import Any
from urllib.parse import urlsplit

from llmtrain.config.compose import load_config
from llmtrain.config.root import TrainConfig
from llmtrain.config.schema import ONLY, exists_in, lookup, settings, variants

NONE = "—"


@dataclass(frozen=True)
class Line:
    """One setting."""

    key: str
    value: str
    default: str
    """`—` where the default choices have no such setting."""
    meaning: str

    @property
    def differs(self) -> bool:
        return self.value != self.default


def lines(config: TrainConfig) -> dict[str, list[Line]]:
    """The settings of each group, those of train.yaml itself under `run`.

    The defaults are those of `python train.py trainer=<kind>`. Directories are shown by their last name, web addresses
    without user and password: a report is passed around.
    """
    data, default = config.model_dump(mode="json"), _defaults(config.trainer.kind)
    groups: dict[str, list[Line]] = {"run": []}
    meanings: dict[tuple[str, ...], str] = {}
    for setting in settings():
        if not exists_in(setting, data):
            continue
        if kinds := variants(setting.field):
            chosen = kinds[lookup(data, (*setting.key, "kind")) or ONLY]
            meanings[(*setting.key, "kind")] = chosen.__doc__ or ""
            continue
        group, name = (setting.key[0], setting.key[1:]) if len(setting.key) > 1 else ("run", setting.key)
        value = lookup(default, setting.key)
        found = NONE if value is None and not exists_in(setting, default) else _shown(value)
        meaning = setting.field.description or meanings.get(setting.key, "")
        line = Line(".".join(name), _shown(lookup(data, setting.key)), found, " ".join(meaning.split()))
        groups.setdefault(group, []).append(line)
    return groups


@cache
def _defaults(kind: str) -> dict[str, Any]:
    has_no_default = [f"trainer.teacher='{NONE}'"] if kind == "distill" else []
    return load_config([f"trainer={kind}", *has_no_default]).model_dump(mode="json")


def _shown(value: Any) -> str:
    match value:
        case None:
            return "null"
        case bool():
            return str(value).lower()
        case float():
            return f"{value:g}"
        case int():
            return f"{value:,}"
        case list():
            return "[" + ", ".join(map(_shown, value)) + "]"
        case str() if "://" in value and urlsplit(value).hostname:
            address = urlsplit(value)
            return address._replace(netloc=address.netloc.rpartition("@")[2]).geturl()
        case str() if PurePath(value).is_absolute() or value.startswith("~"):
            return f"…/{PurePath(value).name}"
    return str(value)
