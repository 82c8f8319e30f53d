"""Directories of prepared data: their keys, their manifests, and whether they are still what they were."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from llmtrain.artifacts import DatasetManifest, SplitCounts
from llmtrain.config.base import content_hash
from llmtrain.data.input_files import Refused
from llmtrain.data.refusals import as_json_lines
from llmtrain.errors import IntegrityError
from llmtrain.files import sha256_of

FORMAT = 2
"""Raised when what is written changes, so that older directories are not taken for it."""


def key_of(*parts: Any) -> str:
    """The name of the directory that is made of `parts`: 16 hex digits of their hash."""
    return content_hash([FORMAT, *parts])[:16]


def write_manifest(
    directory: Path,
    *,
    path: Path,
    kind: Literal["text", "preferences", "chats"],
    parents: tuple[str, ...],
    tokenizer_sha256: str,
    content_sha256: str,
    splits: dict[str, SplitCounts],
    sources: dict[str, str],
    num_duplicates: int,
    refused: Sequence[Refused],
) -> None:
    """Write `refused.jsonl` and, last, `manifest.json` with the hashes of all files in `directory`.

    `path` is where the directory will stand, relative to outputs.
    """
    (directory / "refused.jsonl").write_text(as_json_lines(refused))
    DatasetManifest(
        parents=parents,
        kind=kind,
        path=path.as_posix(),
        content_sha256=content_sha256,
        tokenizer_sha256=tokenizer_sha256,
        splits=splits,
        sources=sources,
        num_duplicates=num_duplicates,
        num_refused=len(refused),
        files={file.name: sha256_of(file) for file in sorted(directory.iterdir())},
    ).write(directory / "manifest.json")


def read_manifest(directory: Path) -> DatasetManifest:
    """The manifest of a prepared directory, after a look at the sizes of its files.

    Raises IntegrityError where a file is missing or the tokens are fewer or more than the manifest counts.
    """
    manifest = DatasetManifest.read(directory / "manifest.json")
    for name in manifest.files:
        if not (directory / name).exists():
            raise _broken(directory / name, "is missing")
    for split, counts in manifest.splits.items():
        shards = [directory / name for name in manifest.files if name.startswith(split) and ".uint" in name]
        item_bytes = 2 if shards[0].suffix == ".uint16" else 4
        if sum(shard.stat().st_size for shard in shards) != counts.num_tokens * item_bytes:
            raise _broken(shards[0], f"and its neighbours do not hold the {counts.num_tokens} tokens of the manifest")
    return manifest


def verify(manifest: DatasetManifest, outputs: Path) -> None:
    """Hash every file again; raises IntegrityError for the first that is missing or changed."""
    for name, sha256 in manifest.files.items():
        file = outputs / manifest.path / name
        if not file.exists():
            raise _broken(file, "is missing")
        if sha256_of(file) != sha256:
            raise _broken(file, "has changed since it was written")


def json_line(value: dict[str, Any]) -> str:
    """`value` as one line of JSON."""
    return json.dumps(value, ensure_ascii=False) + "\n"


def _broken(file: Path, how: str) -> IntegrityError:
    return IntegrityError(f"{file} {how}; delete the directory {file.parent} and run again: it is made anew")
