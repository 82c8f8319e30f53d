"""Small real inputs for the tests of the data package."""

from pathlib import Path

from llmtrain.config.data import PreferenceData, PreferenceFile, TextData, TextFiles

WORDS = "the old grey cat sat by a warm stone wall and the young dog slept under one tall green tree".split()  # noqa: SIM905
SHARES = {"validation_share": 0.2, "test_share": 0.2, "max_refused_share": 0.25, "shard_tokens": 1000, "split_seed": 1}


def story(number: int, num_words: int = 60) -> str:
    """A text of its own for each number."""
    return " ".join(f"{WORDS[(i * i + number * i + number) % len(WORDS)]}" for i in range(num_words)) + f" ({number})\n"


def text_data_of(*paths: str, **changes: float) -> TextData:
    corpus = TextFiles(kind="files", paths=paths, licence="CC0-1.0")
    return TextData.model_validate({"kind": "text", "corpus": corpus, **SHARES, **changes})


def preference_data_of(text_data: TextData, path: Path, template: str = "plain", **changes: float) -> PreferenceData:
    pairs = PreferenceFile.model_validate(
        {"kind": "jsonl", "paths": (str(path),), "licence": "CC0-1.0", "template": template}
    )
    values = {"kind": "preferences", "corpus": text_data.corpus, "pairs": pairs, **SHARES, **changes}
    return PreferenceData.model_validate(values)


def silent(message: str) -> None:
    pass
