"""The append-only, hash-chained log of what happened: `outputs/journal.jsonl`, one event a line.

Each line holds the hash of the line before, so that a changed, removed or inserted line is found by `verify`. Writers
of several processes take turns through a file lock; a line is complete on disk before `append` returns.
"""

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from llmtrain.config.base import content_hash
from llmtrain.errors import IntegrityError

GENESIS = "0" * 64


class Journal:
    """The journal of one outputs directory."""

    def __init__(self, outputs: Path) -> None:
        self.path = outputs / "journal.jsonl"

    def append(self, event: str, **facts: Any) -> dict[str, Any]:
        """Add an event (`stage.verb`, such as `model.registered`) with its facts; returns the line as written.

        A last line that a crash cut short was never acknowledged: it is moved to `journal.torn`.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self._locked() as file:
            last = self._mend(file)
            line = {
                "number": last["number"] + 1 if last else 0,
                "time_utc": datetime.now(UTC).isoformat(timespec="seconds"),
                "event": event,
                "facts": facts,
                "previous_sha256": last["sha256"] if last else GENESIS,
            }
            line["sha256"] = content_hash(line)
            file.seek(0, os.SEEK_END)
            file.write((json.dumps(line, ensure_ascii=False) + "\n").encode())
            file.flush()
            os.fsync(file.fileno())
            return line

    def events(self) -> list[dict[str, Any]]:
        """All events, oldest first. A torn last line is not an event."""
        if not self.path.exists():
            return []
        return [json.loads(line) for line in self.path.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]

    def verify(self) -> int:
        """The number of events; raises IntegrityError at the first line that does not follow from the one before."""
        previous = GENESIS
        for number, line in enumerate(self.events()):
            body = {key: value for key, value in line.items() if key != "sha256"}
            if line["number"] != number or line["previous_sha256"] != previous or line["sha256"] != content_hash(body):
                raise IntegrityError(f"{self.path}:{number + 1}: the hash chain breaks here; restore the file from a backup")
            previous = line["sha256"]
        return len(self.events())

    @contextmanager
    def _locked(self) -> Iterator[Any]:
        with self.path.open("a+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield file

    def _mend(self, file: Any) -> dict[str, Any] | None:
        """The last whole line, after putting a torn one aside."""
        file.seek(0)
        content = file.read()
        whole, _, torn = content.rpartition(b"\n")
        if torn:
            with self.path.with_suffix(".torn").open("ab") as aside:
                aside.write(torn + b"\n")
            file.truncate(len(content) - len(torn))
        return json.loads(whole.rpartition(b"\n")[2]) if whole else None
