"""Why Hydra cannot compose what was chosen, in words."""

import re
from pathlib import Path

import yaml
from hydra.errors import HydraException, MissingConfigException
from omegaconf.errors import OmegaConfBaseException

from llmtrain.config.origins import shown
from llmtrain.config.preflight import Given, Groups
from llmtrain.config.problems import Problem
from llmtrain.config.suggest import closest, did_you_mean

COMPOSITION_ERRORS = (HydraException, OmegaConfBaseException, yaml.YAMLError, OSError, ValueError)
"""What Hydra lets through when a file or an override cannot be composed (ValueError: a header, an encoding)."""


def uncomposable(given: Given | None, error: Exception, groups: Groups) -> Problem:
    """Why a chosen file, or the whole, cannot be composed."""
    group, place = (given.override.key_or_group, given.place) if given else ("", None)
    cause = error.__cause__ if isinstance(error.__cause__, yaml.MarkedYAMLError) else error
    match cause:
        case yaml.MarkedYAMLError(problem_mark=mark, problem=problem) if mark:
            return Problem(f"{shown(Path(mark.name))}:{mark.line + 1}", f"not valid YAML: {problem}", place)
        case MissingConfigException(missing_cfg_file=missing, options=options) if missing:
            other, _, option = missing.rpartition("/")
            known, bases = groups.options.get(other, []), groups.bases.get(other, [])
            guesses = closest(option, [*known, *bases, *(options or [])])
            text = f"needs '{missing}', which does not exist" + did_you_mean(guesses)
            if known and other != group and not option.startswith("_"):
                text += f"; choose {other}=OPTION of {', '.join(known)}"
            return Problem(group, text, place)
    reason = " ".join(line.strip() for line in str(cause).splitlines() if line.strip())
    if unknown := re.search(r"Could not override '(\w+)'", reason):
        reason = reason.rstrip(".") + did_you_mean(closest(unknown[1], groups.options))
    return Problem(group, f"cannot be composed: {reason}", place)
