"""`llmtrain explain`: what a setting is, and which file or override set it."""

import json
import sys
from pathlib import Path

from llmtrain.cli import exits
from llmtrain.cli.flags import Flag, listing, parse
from llmtrain.config.options import conf_directory, options
from llmtrain.errors import ConfigError

FLAGS = [
    Flag("--help", "this text", "-h"),
    Flag("--config-dir", "a directory with your own options, laid out as conf/", "-cd", "DIR"),
    Flag("--config-name", "another defaults list than train", "-cn", "NAME"),
    Flag("--json", "for machines: a list of explanations"),
]
USAGE = """llmtrain explain [FLAG] [KEY] ... [GROUP=OPTION] [KEY=VALUE] ...

  llmtrain explain trainer.lr                   one setting: its value, meaning and limits, what a change of it changes,
                                                and every place that set it, the newest first
  llmtrain explain trainer.lr experiment=smoke  the same, with these overrides
  llmtrain explain trainer                      a group: each of its settings, with the place that set it
  llmtrain explain                              every setting
"""


@exits
def main(argv: list[str] | None = None) -> int:
    """Explain the keys. Mistakes in the overrides hide no explanation; they and unknown keys end with exit code 2."""
    flags, words = parse(sys.argv[1:] if argv is None else argv, FLAGS)
    if "--help" in flags:
        print(USAGE)
        print("\n".join(listing(FLAGS)))
        return 0
    from llmtrain.config.compose import Composer
    from llmtrain.config.explain import as_data, explain, explain_all, paragraph, table
    from llmtrain.config.root import TrainConfig
    from llmtrain.config.roots import ROOTS, command_of

    keys = [word for word in words if "=" not in word and not word.startswith("~")]
    directories = [Path(flags["--config-dir"])] if "--config-dir" in flags else []
    name = command_of(words, flags.get("--config-name", "train"))
    composer = Composer(directories, name, root=ROOTS.get(name, TrainConfig))
    checked = composer.check([word for word in words if word not in keys])
    if checked.composed is None:
        checked.good()
    files = options([conf_directory(), *directories])
    found, problems = [], []
    for key in keys:
        try:
            found.append(explain(key, checked, files))
        except ConfigError as error:
            problems += error.problems
    everything = explain_all(checked)
    if "--json" in flags:
        print(json.dumps([as_data(one) for one in (found if keys else everything)], indent=2, ensure_ascii=False))
    elif not keys:
        print(table(everything))
    elif found:
        parts = [part for one in found for part in (paragraph(one), table(one.inside)) if part]
        print("\n\n".join(parts))
    left_open = {one.key for one in everything if one.value == "???"}  # to ask about it is no mistake
    if name in ("serve", "optimisation") and not any(word.startswith(("version=", "run=")) for word in words):
        left_open.add("")  # nor that no model is named
    problems += [str(problem) for problem in checked.problems if problem.key not in left_open]
    if problems:
        raise ConfigError(problems)
    return 0
