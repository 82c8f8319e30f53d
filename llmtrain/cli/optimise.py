"""`llmtrain optimise`: make another form of a model, measure it here, and keep it where it is worth it."""

import sys

from llmtrain.cli import exits
from llmtrain.cli.of_a_model import FLAGS, optimise_config

__all__ = ["FLAGS", "main"]


@exits
def main(argv: list[str] | None = None) -> int:
    """Exit code 3 where the form is refused: neither faster nor smaller here, or not good enough."""
    config = optimise_config(sys.argv[1:] if argv is None else argv)
    if config is None:
        return 0
    from llmtrain.optimise.run import run  # seconds of imports: only once the config is known to be good

    run(config, lambda line: print(line, flush=True))
    return 0
