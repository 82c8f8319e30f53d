"""`metrics.jsonl`: the rows of a run, one JSON line each. What trackers and curves show is read from here.

A row has `step`, `tokens` (both counted from the start of the run), `time_utc` (ISO 8601), `seconds` (of training so
far) and metrics named `<split>/<quantity>`.
"""

import json
import math
import os
from pathlib import Path
from typing import Any

from llmtrain.errors import IntegrityError
from llmtrain.files import fsync, writing

METRICS_FILE = "metrics.jsonl"
"""Its name in a run's directory."""

REMEDY = "restore it from a copy (MLflow's artifacts may have one), or move the run's directory away to train it anew"

_NON_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


class MetricsFile:
    """The file of one run, open for appending by one writer; a resumed run begins with `truncate`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = path.open("ab")

    def append(self, row: dict[str, Any]) -> None:
        """Add a row; it survives the death of the process, and the machine's after the next `size`.

        Floats are read back bit for bit; JSON has no NaN and no infinity, so these are written as strings.
        """
        line = json.dumps({key: _encoded(value) for key, value in row.items()}, allow_nan=False)
        with writing(self.path):
            self._file.write(line.encode() + b"\n")
            self._file.flush()

    @property
    def size(self) -> int:
        """Bytes, all of them on disk: what a checkpoint stores and a resume gives to `truncate`."""
        with writing(self.path):
            os.fsync(self._file.fileno())
        return os.fstat(self._file.fileno()).st_size

    def truncate(self, size: int) -> None:
        """Cut away the rows after the first `size` bytes.

        Raises IntegrityError where rows before them are missing or damaged.
        """
        if self.size < size:
            raise IntegrityError(
                f"{self.path} has {self.size} bytes, but the checkpoint was written after {size}: rows are missing; "
                f"{REMEDY}"
            )
        self._file.truncate(size)
        fsync(self.path)
        read(self.path)

    def close(self) -> None:
        """Raises as `append` where the last row is not on disk."""
        with writing(self.path):
            self._file.close()


class NoMetrics(MetricsFile):
    """What ranks other than 0 have in its place."""

    def __init__(self) -> None:
        self.path = Path(os.devnull)

    def append(self, row: dict[str, Any]) -> None:
        pass

    def truncate(self, size: int) -> None:
        pass

    def close(self) -> None:
        pass


def read(path: Path) -> list[dict[str, Any]]:
    """The rows of a file, none where there is no file. A last line without its end is not a row yet.

    Raises IntegrityError for a line that is not JSON.
    """
    if not path.exists():
        return []
    lines = path.read_bytes().split(b"\n")[:-1]
    return [_decoded(line, f"{path}:{number}") for number, line in enumerate(lines, start=1)]


def without_times(row: dict[str, Any]) -> dict[str, Any]:
    """What of a row two runs with equal mathematics have in common: all but the times and speeds."""
    return {
        key: value
        for key, value in row.items()
        if key not in ("time_utc", "seconds") and not key.endswith("_per_second")
    }


def _encoded(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value


def _decoded(line: bytes, place: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise IntegrityError(f"{place}: not a row of metrics ({error}); {REMEDY}") from error
    if not isinstance(row, dict):
        raise IntegrityError(f"{place}: not a row of metrics; {REMEDY}")
    return {key: _NON_FINITE.get(value, value) if isinstance(value, str) else value for key, value in row.items()}
