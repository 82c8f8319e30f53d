"""What TAB offers: commands, flags, groups and their options, settings and their values.

Hydra's own completion offers bases (`_base`) as options, leaves settings of the chosen kind out once a choice is wrong,
and knows no command but the one. Bash asks this file; the scripts for other shells are Hydra's.
"""

import json
import os
import sys
from collections.abc import Iterable
from importlib import import_module
from pathlib import Path

from llmtrain.cli import UsageError
from llmtrain.cli.flags import Flag, parse
from llmtrain.config.options import conf_directory, options

BASH = """\
_llmtrain_complete() {
    local IFS=$'\\n' line=${COMP_LINE:0:COMP_POINT} ask
    case ${COMP_WORDS[0]##*/} in
        python*) [[ ${COMP_WORDS[1]##*/} == @(train|serve).py ]] || return; ask=("${COMP_WORDS[@]:0:2}") ;;
        *) ask=("${COMP_WORDS[0]}" train) ;;
    esac
    COMPREPLY=($(COMP_LINE=$line "${ask[@]}" --shell-completion query=bash 2>/dev/null))
    [[ ${#COMPREPLY[@]} == 1 && $COMPREPLY == *[=.] ]] && compopt -o nospace
    local word=${line##* }
    [[ $word == *=* && $COMP_WORDBREAKS == *=* ]] && COMPREPLY=("${COMPREPLY[@]#"${word%=*}="}")
}
complete -o default -F _llmtrain_complete """
"""Bash completes the part after `=` on its own, so what stands before is taken off. No match: bash completes files."""


def answer(request: list[str]) -> str | None:
    """What `--shell-completion REQUEST` prints; None where Hydra answers. The line is in `COMP_LINE`, as bash says."""
    program = "python" if sys.argv[0].endswith(".py") else os.path.basename(sys.argv[0])
    match request:
        case ["query=bash" | "query=zsh" | "query=fish"]:
            return "\n".join(candidates(os.environ.get("COMP_LINE", "")))
        case ["install=bash"]:
            return BASH + program
        case ["uninstall=bash"]:
            return f"complete -r {program}; unset -f _llmtrain_complete"
    return None


def candidates(line: str) -> list[str]:
    """What the last word of a command line may become, in alphabetical order."""
    from llmtrain.cli.main import COMMANDS

    *before, word = line.split(" ")
    words = [one for one in before if one]
    if not words:
        return []
    if words[0].endswith("llmtrain"):
        if len(words) == 1:
            return _beginning(word, COMMANDS)
        command, words = words[1], words[2:]
    else:
        script, *words = words if words[0].endswith(".py") else words[1:]
        command = Path(script).stem
    flags: list[Flag] = getattr(import_module(f"llmtrain.cli.{command}"), "FLAGS", []) if command in COMMANDS else []
    if not flags:
        return []
    last = next((flag for flag in flags if words and words[-1] in (flag.name, flag.short)), None)
    if last and last.value and not word.startswith("-"):
        return _beginning(word, last.choices)
    if word.startswith("-"):
        return _beginning(word, [flag.name for flag in flags])
    try:
        given, overrides = parse(words, flags)
    except UsageError:
        return []
    directories = [Path(given["--config-dir"])] if "--config-dir" in given else []
    name = given.get("--config-name", {"serve": "serve", "optimise": "optimisation"}.get(command, "train"))
    return _overrides(word, overrides, directories, name, asks=command == "explain")


def _overrides(word: str, overrides: list[str], directories: list[Path], name: str, asks: bool) -> list[str]:
    """Options, settings and values; with `asks` a setting may stand alone."""
    from llmtrain.config.root import TrainConfig
    from llmtrain.config.roots import ROOTS, owner_of

    root = ROOTS.get(name, TrainConfig)
    found = options([conf_directory(), *directories])
    groups = {group: files for group, files in found.items() if owner_of(group, root) is None}
    sign = word[: len(word) - len(word.lstrip("+~"))]
    key, equals, value = word.removeprefix(sign).partition("=")
    if equals and key in groups:
        first, comma, last = value.rpartition(",")
        return [f"{sign}{key}={first}{comma}{option}" for option in _beginning(last, groups[key])]
    from llmtrain.config.compose import Composer
    from llmtrain.config.schema import choices, exists_in, lookup, settings, variants

    given = [one for one in overrides if "=" in one or one.startswith("~")]
    data = Composer(directories, name, root=root).check(given).data
    every = settings(root)
    here = {".".join(setting.key): setting for setting in every if exists_in(setting, data)}
    if equals:
        values = {one for setting in every if ".".join(setting.key) == key for one in choices(setting.field.annotation)}
        if not values and (now := lookup(data, tuple(key.split(".")))) is not None:
            values = {json.dumps(now).strip('"')}
        return [f"{sign}{key}={one}" for one in _beginning(value, values)]
    level = key.count(".")
    names = [f"{group}=" for group in groups if not asks]
    for dotted, setting in here.items():
        if dotted.count(".") == level:
            names += [f"{dotted}."] if variants(setting.field) else [dotted if asks else f"{dotted}="]
    if asks:
        names += [dotted for dotted, setting in here.items() if variants(setting.field) and dotted.count(".") == level]
    return [sign + one for one in _beginning(key, names)]


def _beginning(word: str, names: Iterable[str]) -> list[str]:
    return sorted(one for one in names if one.startswith(word))
