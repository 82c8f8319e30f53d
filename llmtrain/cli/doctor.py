"""`llmtrain doctor RUN`: why a run is slow or sick, and which override helps."""

import json
import sys
from pathlib import Path

from llmtrain.cli import UsageError, exits
from llmtrain.cli.flags import Flag, listing, parse
from llmtrain.errors import RunFailed

FLAGS = [
    Flag("--help", "this text", "-h"),
    Flag("--json", "for machines: one object"),
    Flag("--quick", "read files only: the rows that made a loss jump are not looked for"),
]
USAGE = """llmtrain doctor [FLAG] RUN

RUN is a run's directory, outputs/NAME/RUN_ID, finished or not; nothing in it is changed. Looked for: waiting for data,
for evaluations, checkpoints and the GPU, compilation that goes on, padding, losses that jump with the rows that made
them, and where a loss stopped being a number. Exit code 0: nothing found, 3: something was.
"""


@exits
def main(argv: list[str] | None = None) -> int:
    """Examine one run and print what was found."""
    flags, words = parse(sys.argv[1:] if argv is None else argv, FLAGS)
    if "--help" in flags:
        print(USAGE)
        print("\n".join(listing(FLAGS)))
        return 0
    if len(words) != 1:
        raise UsageError("llmtrain doctor wants one run's directory, outputs/NAME/RUN_ID; --help says more")
    from llmtrain.doctor.examine import examine

    found = examine(Path(words[0]), rescore="--quick" not in flags)
    print(json.dumps(found.as_data(), indent=2, ensure_ascii=False) if "--json" in flags else found.as_text())
    return RunFailed.exit_code if found.findings else 0
