"""Refused records: counted, written down, and too many of them stop the preparation."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from llmtrain.data.input_files import Refused
from llmtrain.errors import DataError
from llmtrain.files import write_whole

SHOWN = 3


def as_json_lines(refused: Sequence[Refused]) -> str:
    """One {"where", "reason"} a line."""
    return "".join(json.dumps(asdict(record), ensure_ascii=False) + "\n" for record in refused)


def check_refused_share(refused: Sequence[Refused], num_records: int, max_share: float, report: Path) -> None:
    """Raises DataError if more than `max_share` of `num_records` are refused; `report` then has all of them."""
    if len(refused) <= max_share * num_records:
        return
    report.parent.mkdir(parents=True, exist_ok=True)
    write_whole(report, as_json_lines(refused))
    first = "\n".join(f"  {record.where}: {record.reason}" for record in refused[:SHOWN])
    raise DataError(
        f"{len(refused)} of {num_records} records are refused, more than data.max_refused_share={max_share} allows:\n"
        f"{first}\n"
        f"All of them, with reasons, are in {report}; correct the records or raise data.max_refused_share"
    )
