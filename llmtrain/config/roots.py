"""The commands that compose a config: the name of the file with their defaults list, and the class of the whole."""

from collections.abc import Sequence

from llmtrain.config.base import Settings
from llmtrain.config.root import TrainConfig
from llmtrain.config.serve import OptimiseConfig, ServeConfig

ROOTS: dict[str, type[Settings]] = {"train": TrainConfig, "serve": ServeConfig, "optimisation": OptimiseConfig}
PROGRAMS = {"train": "python train.py", "serve": "python serve.py", "optimisation": "llmtrain optimise"}
"""What people type."""


def owner_of(group: str, root: type[Settings]) -> str | None:
    """The program whose config has `group` where that of `root` has none; None where it has, or nobody has."""
    if group in root.model_fields:
        return None
    return next((PROGRAMS[name] for name, other in ROOTS.items() if group in other.model_fields), None)


def root_for(key: str, chosen: str) -> str:
    """The name of the config that a setting belongs to: `chosen`, or the one that has its group where that has not."""
    group = key.lstrip("+~").partition(".")[0]
    if chosen not in ROOTS or group in ROOTS[chosen].model_fields:
        return chosen
    return next((name for name, root in ROOTS.items() if group in root.model_fields), chosen)


def command_of(words: Sequence[str], chosen: str = "train") -> str:
    """The name of the config that overrides, or keys, are for: the first one whose group `chosen` lacks decides."""
    names = [root_for(word.partition("=")[0], chosen) for word in words]
    return next((name for name in names if name != chosen), chosen)
