"""Small commands on a user's own files."""

from pathlib import Path

SMALL = [
    "model=qwen3_tiny",
    "infra.precision=fp32",
    "infra.threads=1",
    "tracking=none",
    "trainer.sequence_tokens=64",
    "trainer.batch_rows=4",
    "trainer.warmup_tokens=100",
]
PRETRAIN = [*SMALL, "trainer.budget_tokens=1_024"]


def files(pattern: str) -> list[str]:
    return ["data=text_files", f"data.corpus.paths=[{pattern}]", "data.corpus.licence=PSF-2.0"]


def jsonl(path: Path, lines: list[str]) -> list[str]:
    path.write_text("\n".join(lines) + "\n")
    return ["data=text_jsonl", f"data.corpus.paths=[{path.name}]", "data.corpus.licence=PSF-2.0"]
