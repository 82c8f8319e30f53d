"""One option at a time: is it good on top of the defaults, or of those that fit it?"""

import re
from collections.abc import Sequence
from pathlib import Path

from llmtrain.config.base import Settings
from llmtrain.config.compose import Checked, Composer
from llmtrain.config.options import options
from llmtrain.config.origins import shown
from llmtrain.config.schema import setting_at, wanted

Options = dict[str, dict[str, Path]]


def check_option(
    composer: Composer[Settings], group: str, option: str, path: Path, found: Options
) -> tuple[list[str], list[str]]:
    """What must stand beside `group=option` to make it good, and what is wrong with it; one of the two is empty.

    Where the command is about a model, a stand-in is named.

    An option may need another option of another group (preference data need the trainer that learns from them), and may
    leave text to the user (`paths: ???` in its own file), for which a stand-in is put in.
    """
    first: list[str] = []
    contexts: list[list[str]] = [["version=STAND_IN"] if "version" in composer.root.model_fields else []]
    plain = contexts[0]
    for context in contexts:
        checked = composer.check([f"{group}={option}", *context])
        needed = [*context, *_stand_ins(checked, path)]
        if needed != context:
            checked = composer.check([f"{group}={option}", *needed])
        if not checked.problems:
            return needed, []
        if context == plain:
            first = [str(problem) for problem in checked.problems]
            words = set(re.findall(r"\w+", " ".join(first)))
            others = [other for other in found if other in words and other not in (group, "experiment")]
            others = [other for other in others if other in composer.root.model_fields]
            contexts += [[*plain, f"{other}={name}"] for other in others for name in found[other]]
    return [], first


def _stand_ins(checked: Checked[Settings], path: Path) -> list[str]:
    """An override for each text that the option's own file leaves to the user."""
    overrides = []
    for key in checked.open_keys:
        origin, setting = checked.origins().last(key), setting_at(key, checked.data, checked.root)
        if origin and origin.file == path and setting:
            if wanted(setting.field).startswith("text"):
                overrides.append(f"{'.'.join(key)}=STAND_IN")
            elif wanted(setting.field).startswith("a list of text"):
                overrides.append(f"{'.'.join(key)}=[STAND_IN]")
    return overrides


def hidden_options(shipped: Path, directories: Sequence[Path]) -> list[str]:
    """The user's options that have the name of a shipped one, which Hydra finds first."""
    names = options([shipped])
    return [
        f"{group}={option}: hidden by the shipped option of that name; rename {shown(path)}"
        for group, files in options(directories).items()
        for option, path in files.items()
        if option in names.get(group, {})
    ]
