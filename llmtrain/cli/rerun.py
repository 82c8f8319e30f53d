"""`llmtrain rerun`: a run once more, from its directory alone."""

import sys
from pathlib import Path

from llmtrain.cli import UsageError, exits
from llmtrain.cli.flags import Flag, listing, parse
from llmtrain.errors import RunFailed

FLAGS = [
    Flag("--help", "this text", "-h"),
    Flag("--force", "begin although it will not fit into memory by its plan"),
]
USAGE = """llmtrain rerun [FLAG] RUN_DIRECTORY

Makes the run again from its config.json, as another attempt beside it, on this machine. Says what differs of code,
versions and hardware before it begins, and at its end whether the result is bit-equal; the exit code is 3 where not.
Typed again after an interruption, it goes on.
"""


@exits
def main(argv: list[str] | None = None) -> int:
    """Rerun one run."""
    flags, words = parse(sys.argv[1:] if argv is None else argv, FLAGS)
    if "--help" in flags:
        print(USAGE)
        print("\n".join(listing(FLAGS)))
        return 0
    if len(words) != 1:
        raise UsageError("llmtrain rerun needs one run's directory, outputs/NAME/RUN_ID")
    directory = Path(words[0])
    from llmtrain.config.frozen import thaw

    thaw(directory / "config.json")  # before seconds of imports
    from llmtrain.launch.rerun import rerun

    return 0 if rerun(directory, force="--force" in flags) else RunFailed.exit_code
