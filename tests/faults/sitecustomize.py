"""Put on PYTHONPATH by the tests of faults: kills this process, with SIGKILL, where KILL_AT says.

    KILL_AT=fsync:5     in the fifth fsync of something inside a directory `step-*.writing`: in the middle of a save
    KILL_AT=saved:2     right after the second checkpoint got its name
    KILL_AT=row:3       just before the third row of metrics.jsonl is written: after the step, before the save

The moment is proved by a line on stderr, and the process dies as it would by `kill -9`.
"""

import os
import signal
import sys

KIND, _, NUMBER = os.environ.get("KILL_AT", "").partition(":")
seen = 0


def count() -> None:
    global seen
    seen += 1
    if seen == int(NUMBER):
        sys.stderr.write(f"\nKILLED at {KIND} {NUMBER}\n")
        sys.stderr.flush()
        os.kill(os.getpid(), signal.SIGKILL)


def of(descriptor: int) -> str:
    return os.readlink(f"/proc/self/fd/{descriptor}")


if KIND in ("fsync", "saved"):
    fsync = os.fsync

    def watched_fsync(descriptor: int) -> None:
        name = of(descriptor)
        if KIND == "fsync" and "/step-" in name and ".writing" in name:
            count()
        fsync(descriptor)
        if KIND == "saved" and name.endswith("/checkpoints"):
            count()

    os.fsync = watched_fsync

if KIND == "row":
    import json

    dumps = json.dumps

    def watched_dumps(*arguments, **options):
        text = dumps(*arguments, **options)
        if '"train/loss"' in text:
            count()
        return text

    json.dumps = watched_dumps
