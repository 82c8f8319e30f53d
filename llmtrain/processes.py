"""What every process that starts another one, or is stopped by one, agrees on."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2)
"""What asks a run to save and to stop. SIGUSR2 is how schedulers say that time is nearly up."""


@contextmanager
def importable() -> Iterator[None]:
    """Let processes that are started in the block find this llmtrain where it is a checkout and not installed."""
    root, before = str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(dict.fromkeys(filter(None, (root, *(before or "").split(os.pathsep)))))
    try:
        yield
    finally:
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before
