"""The append-only, hash-chained log of what happened: `outputs/journal.jsonl`, one event a line.

Each line holds the hash of the line before, so that `verify` finds a changed, removed or inserted line; that lines are
missing at the end is seen only by who kept a later hash. Writers of several processes take turns through a file lock;
a line is complete on disk before `append` returns.
"""

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, BinaryIO

from llmtrain.config.base import content_hash
from llmtrain.errors import IntegrityError
from llmtrain.files import fsync, writing

GENESIS = "0" * 64
"""`previous_sha256` of the first line."""


class Journal:
    """The journal of one outputs directory."""

    def __init__(self, outputs: Path) -> None:
        self.path = outputs / "journal.jsonl"

    def append(self, event: str, **facts: Any) -> dict[str, Any]:
        """Add an event (`stage.verb`, such as `model.registered`) with its facts; returns the line as written.

        A last line that a crash cut short was never acknowledged: it is moved to `journal.torn`. Raises IntegrityError
        where the last whole line is damaged.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with writing(self.path), self._locked() as file:
            last = self._mend(file)
            line = {
                "number": last["number"] + 1 if last else 0,
                "time_utc": datetime.now(UTC).isoformat(timespec="seconds"),
                "event": event,
                "facts": facts,
                "previous_sha256": last["sha256"] if last else GENESIS,
            }
            line["sha256"] = content_hash(line)
            file.write((json.dumps(line, ensure_ascii=False) + "\n").encode())
            file.flush()
            os.fsync(file.fileno())
            if last is None:
                fsync(self.path.parent)
            return line

    def events(self) -> list[dict[str, Any]]:
        """All events, oldest first; a torn last line is none. Raises IntegrityError for a line that is no JSON."""
        if not self.path.exists():
            return []
        lines = self.path.read_bytes().split(b"\n")[:-1]
        return [self._parse(line, number) for number, line in enumerate(lines)]

    def verify(self) -> int:
        """The number of events; raises IntegrityError at the first line that does not follow from the one before."""
        previous = GENESIS
        events = self.events()
        for number, line in enumerate(events):
            body = {key: value for key, value in line.items() if key != "sha256"}
            expected = {"number": number, "previous_sha256": previous, "sha256": content_hash(body)}
            if any(line.get(key) != value for key, value in expected.items()):
                raise self._broken(number)
            previous = line["sha256"]
        return len(events)

    @contextmanager
    def _locked(self) -> Iterator[BinaryIO]:
        with self.path.open("a+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield file

    def _mend(self, file: BinaryIO) -> dict[str, Any] | None:
        """The last whole line, after putting a torn one aside."""
        file.seek(0)
        content = file.read()
        whole, _, torn = content.rpartition(b"\n")
        if torn:
            with self.path.with_suffix(".torn").open("ab") as aside:
                aside.write(torn + b"\n")
            file.truncate(len(content) - len(torn))
        return self._parse(whole.rpartition(b"\n")[2], whole.count(b"\n")) if whole else None

    def _parse(self, line: bytes, number: int) -> dict[str, Any]:
        try:
            event = json.loads(line)
        except ValueError as error:
            raise self._broken(number) from error
        if not isinstance(event, dict):
            raise self._broken(number)
        return event

    def _broken(self, number: int) -> IntegrityError:
        return IntegrityError(f"{self.path}:{number + 1}: the hash chain breaks here; restore the file from a backup")
