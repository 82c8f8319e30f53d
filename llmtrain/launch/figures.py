"""A run's figures, from the files in its directory. Imports nothing that trains."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

READ_BYTES = 65_536
"""From the end of metrics.jsonl: rows enough for the newest of each figure."""


def last_rows(directory: Path) -> list[dict[str, Any]]:
    """The last rows of metrics.jsonl, which may be growing: whole lines only."""
    return [json.loads(line) for line in _last_lines(directory)]


def _last_lines(directory: Path) -> list[bytes]:
    try:
        with (directory / "metrics.jsonl").open("rb") as file:
            size = file.seek(0, 2)
            file.seek(max(0, size - READ_BYTES))
            return file.read().split(b"\n")[(1 if size > READ_BYTES else 0) : -1]
    except FileNotFoundError:
        return []


def rows_of(directory: Path, name: str) -> Iterator[tuple[int, float]]:
    """Tokens and value of each row that has the figure, oldest first."""
    try:
        content = (directory / "metrics.jsonl").read_bytes()
    except FileNotFoundError:
        return
    for line in content.split(b"\n")[:-1]:
        row = json.loads(line)
        if name in row:
            yield row["tokens"], _number(row[name])


def figure(directory: Path, name: str) -> float | None:
    """The last value of a figure: that of the finished run's record where it has one, else metrics.jsonl's newest."""
    record = directory / "trained.json"
    if record.exists() and name in (last := json.loads(record.read_bytes())["metrics"]):
        return _number(last[name])
    values = [value for _, value in rows_of(directory, name)]
    return values[-1] if values else None


def logged_bytes(directory: Path) -> int:
    """The size of metrics.jsonl: it grows with each row."""
    try:
        return (directory / "metrics.jsonl").stat().st_size
    except FileNotFoundError:
        return 0


def newest_tokens(directory: Path) -> int:
    """How far the run has come; 0 before its first row."""
    lines = _last_lines(directory)
    return json.loads(lines[-1])["tokens"] if lines else 0


def trained_seconds(directory: Path) -> float:
    """How long the run has trained, all starts together; 0 before its first row."""
    lines = _last_lines(directory)
    return float(json.loads(lines[-1])["seconds"]) if lines else 0.0


def _number(value: Any) -> float:
    """JSON has no NaN and no infinity: they stand there as text, which `float` reads."""
    number = float(value)
    return number if math.isfinite(number) else math.nan
