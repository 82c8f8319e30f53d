"""`llmtrain check`: does every option compose and validate, the shipped ones and those of `--config-dir`?"""

import sys
from pathlib import Path

from llmtrain.cli import exits
from llmtrain.cli.flags import Flag, listing, parse
from llmtrain.config.options import conf_directory, options
from llmtrain.errors import ConfigError

FLAGS = [
    Flag("--help", "this text", "-h"),
    Flag("--config-dir", "a directory with your own options, laid out as conf/: they are checked too", "-cd", "DIR"),
]


@exits
def main(argv: list[str] | None = None) -> int:
    """Check all options, or, with overrides, the one command line that they are."""
    flags, overrides = parse(sys.argv[1:] if argv is None else argv, FLAGS)
    if "--help" in flags:
        print(
            "llmtrain check [FLAG] [GROUP=OPTION] [KEY=VALUE] ...     Without overrides: every option of every group.\n"
        )
        print("\n".join(listing(FLAGS)))
        return 0
    from llmtrain.config.check import check_option, hidden_options
    from llmtrain.config.compose import Composer
    from llmtrain.config.root import TrainConfig
    from llmtrain.config.roots import PROGRAMS, ROOTS, command_of, root_for

    directories = [Path(flags["--config-dir"])] if "--config-dir" in flags else []
    composers = {name: Composer(directories, name, files_stay=True, root=root) for name, root in ROOTS.items()}
    if overrides:
        name = command_of(overrides)
        config = composers[name].check(overrides).good()
        print(f"good: {config.name if isinstance(config, TrainConfig) else PROGRAMS[name]}")
        return 0
    problems = hidden_options(conf_directory(), directories)
    found = options([conf_directory(), *directories])
    for group, files in found.items():
        for option, path in files.items():
            composer = composers[root_for(group, "train")]
            needed, wrong = check_option(composer, group, option, path, found)
            print(f"{'wrong' if wrong else 'good '} {group}={option}" + (f" with {' '.join(needed)}" if needed else ""))
            problems += [f"{group}={option}: {problem}" for problem in wrong]
    count = sum(map(len, found.values()))
    print(f"{count} options, {len(problems)} problem{'' if len(problems) == 1 else 's'}")
    if problems:
        raise ConfigError(problems)
    return 0
