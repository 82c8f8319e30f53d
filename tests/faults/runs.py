"""The two small runs that are killed: a pretraining with dropout, and a preference tuning of what it made."""

from pathlib import Path
from pydoc_data.topics import topics

PRETRAIN_NAME, DPO_NAME = "qwen3_tiny-pretrain", "qwen3_tiny-dpo"
SMALL = (
    "model=qwen3_tiny",
    "model.attention_dropout=0.1",  # draws from the random generator at every step
    "infra.precision=fp32",
    "infra.threads=1",
    "trainer.batch_rows=4",
    "trainer.warmup_tokens=1_000",
    "trainer.log_every_tokens=500",  # no multiple of a step, or of each other: rows, evaluations and saves fall apart
    "trainer.evaluate_every_tokens=1_300",
    "trainer.checkpoint_every_tokens=700",
    "trainer.sample_tokens=3",
)
PRETRAIN = (
    *SMALL,
    "data=text_files",
    "data.corpus.paths=[text/*.txt]",
    "data.corpus.licence=PSF-2.0",
    "trainer.budget_tokens=5_120",
    "trainer.sequence_tokens=64",
)
"""20 steps."""
DPO = (
    *SMALL,
    "trainer=dpo",
    "data.corpus={kind: files, paths: [text/*.txt], licence: PSF-2.0}",
    "data.pairs={kind: continuations, prompt_characters: 60, answer_characters: 40, max_training_pairs: 60}",
    "trainer.epochs=1",
)
"""15 steps of about 370 tokens."""


def text(directory: Path, num_documents: int = 60, characters: int = 4000) -> None:
    """Write the longest documents of the running interpreter's own documentation to `text/`, cut to `characters`."""
    (directory / "text").mkdir(parents=True)
    longest = sorted(topics.values(), key=lambda topic: -len(topic))[:num_documents]
    for number, topic in enumerate(longest):
        (directory / "text" / f"{number:02}.txt").write_text(topic[:characters])
