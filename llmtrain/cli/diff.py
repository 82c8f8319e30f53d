"""`llmtrain diff`: what differs between two runs, two revisions of conf/, or two command lines, and what it changes."""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from llmtrain.cli import UsageError, exits
from llmtrain.cli.flags import Flag, listing, parse

if TYPE_CHECKING:
    from llmtrain.config.compare import Side

FLAGS = [
    Flag("--help", "this text", "-h"),
    Flag("--markdown", "for a comment"),
    Flag("--json", "for machines"),
    Flag("--pull-request", "A..B: a comment on all that a pull request changes, plans before and after", "", "A..B"),
    Flag("--config-dir", "a directory with your own options, laid out as conf/", "-cd", "DIR"),
    Flag("--config-name", "another defaults list than train", "-cn", "NAME"),
]
USAGE = """llmtrain diff [FLAG] RUN RUN
llmtrain diff [FLAG] A..B [GROUP=OPTION] [KEY=VALUE] ...
llmtrain diff [FLAG] [GROUP=OPTION] [KEY=VALUE] ... -- [GROUP=OPTION] [KEY=VALUE] ...

  llmtrain diff outputs/smoke/A outputs/smoke/B      two runs, by their directories
  llmtrain diff main..HEAD experiment=smoke          conf/ in two revisions of the git repository around you, under the
                                                     same overrides; 'main..' is main and the working tree,
                                                     'main...HEAD' begins where HEAD left main
  llmtrain diff trainer.lr=1e-3 -- trainer.lr=3e-3   two command lines, as for `llmtrain train`

Ends with 0 whether or not something differs.
"""


@exits
def main(argv: list[str] | None = None) -> int:
    """Compare what the words name."""
    argv = sys.argv[1:] if argv is None else argv
    bar = argv.index("--") if "--" in argv else len(argv)
    (flags, words), (more, others) = parse(argv[:bar], FLAGS), parse(argv[bar + 1 :], FLAGS)
    flags |= more
    if "--help" in flags:
        print(USAGE)
        print("\n".join(listing(FLAGS)))
        return 0
    if "--markdown" in flags and "--json" in flags:
        raise UsageError("--markdown and --json exclude each other")
    if "--pull-request" in flags:
        if words or others:
            raise UsageError(f"--pull-request takes every experiment; leave out '{(words + others)[0]}'")
        return _pull_request(flags)
    with _sides(words, others if "--" in argv else None, flags) as (before, after):
        from llmtrain.config.compare import compare
        from llmtrain.diff.derived import derived
        from llmtrain.diff.words import markdown, text

        found, figures = compare(before, after), derived(before, after)
        if "--json" in flags:
            data = found.model_dump(mode="json") | {"derived": figures.model_dump(mode="json")}
            print(json.dumps(data, indent=2, ensure_ascii=False))
        else:
            print((markdown if "--markdown" in flags else text)(found, figures))
    return 0


def _pull_request(flags: dict[str, str]) -> int:
    from llmtrain.config.revisions import ends_of, top_of_repository
    from llmtrain.diff.pull_request import comment, examine

    top = top_of_repository(Path.cwd())
    found = examine(*ends_of(flags["--pull-request"], top), top)
    print(found.model_dump_json(indent=2) if "--json" in flags else comment(found))
    return 0


@contextmanager
def _sides(words: list[str], others: list[str] | None, flags: dict[str, str]) -> "Iterator[tuple[Side, Side]]":
    """The two sides that the words before and after `--` name; `others` is None where there is no `--`."""
    from llmtrain.config.compare import composed, of_run
    from llmtrain.config.compose import Composer
    from llmtrain.config.frozen import thaw

    names = [word for word in words if not _is_override(word)]
    overrides = [word for word in words if _is_override(word)]
    directories = [Path(flags["--config-dir"])] if "--config-dir" in flags else []
    config_name = flags.get("--config-name", "train")
    if others is not None:
        if wrong := names + [word for word in others if not _is_override(word)]:
            raise UsageError(f"{wrong[0]}: only overrides stand beside '--'; two runs are written side by side")
        composer = Composer(directories, config_name)
        checks = [(" ".join(side) or "the defaults", composer.check(side)) for side in (words, others)]
        yield composed(*checks[0]), composed(*checks[1])
    elif len(names) == 1 and _is_range(names[0]):
        with _revisions(names[0], overrides, directories, config_name) as sides:
            yield sides
    elif len(names) == 2:
        if overrides:
            raise UsageError(f"a run's config is frozen; leave out '{overrides[0]}'")
        frozen = [thaw(path / "config.json" if path.is_dir() else path) for path in map(Path, names)]
        first, second = (
            of_run(name.removesuffix("/config.json"), run) for name, run in zip(names, frozen, strict=True)
        )
        yield first, second
    else:
        got = f"got {len(names)} names ({', '.join(names)})" if names else "got overrides without '--'"
        raise UsageError(f"nothing to compare: {got if words else 'got nothing'}; the three ways are\n\n{USAGE}")


@contextmanager
def _revisions(
    revisions: str, overrides: list[str], directories: list[Path], config_name: str
) -> "Iterator[tuple[Side, Side]]":
    """conf/, and `directories` that lie in the repository, in two revisions under the same overrides."""
    from contextlib import ExitStack

    from llmtrain.config.compare import composed
    from llmtrain.config.compose import Composer
    from llmtrain.config.revisions import ends_of, top_of_repository, tree_of

    top = top_of_repository(Path.cwd())
    own = [path for path in (directory.resolve() for directory in directories) if path.is_relative_to(top)]
    folders = ["conf", *(path.relative_to(top).as_posix() for path in own)]
    with ExitStack() as stack:
        sides = []
        for revision in ends_of(revisions, top):
            tree = stack.enter_context(tree_of(revision, top, folders))
            there = [
                tree.top / path.relative_to(top) if path in own else path for path in map(Path.resolve, directories)
            ]
            checked = Composer(there, config_name, tree.conf).check(overrides)
            sides.append(composed(tree.name, checked, str(tree.top)))
        yield sides[0], sides[1]


def _is_override(word: str) -> bool:
    return "=" in word or word.startswith("~")


def _is_range(word: str) -> bool:
    return ".." in word and not word.startswith(("../", "./")) and not Path(word).exists()
