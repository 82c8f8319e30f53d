"""`llmtrain serve`, and `python serve.py`: serve the model that the command line names.

The model's own record says what is served, the command line where and by which engine. Exit codes are those of
`llmtrain.errors`: 0 after SIGTERM or Ctrl-C, with every request answered; 3 where the engine ended by itself.
"""

import sys

from llmtrain.cli import exits
from llmtrain.cli.of_a_model import FLAGS, serve_config

__all__ = ["FLAGS", "main"]


@exits
def main(argv: list[str] | None = None) -> int:
    """Serve until a signal comes."""
    config = serve_config(sys.argv[1:] if argv is None else argv)
    if config is None:
        return 0
    from llmtrain.serving.run import serve  # seconds of imports: only once the config is known to be good

    return serve(config, lambda line: print(line, flush=True))
