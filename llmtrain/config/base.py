"""What every schema shares: strict frozen models, and what a change of a field changes.

YAML owns values, so no schema has a default; pydantic owns meaning, so the docstring under each field gives its unit
and effect. `Changes` stands in each field's annotation and decides whether the run id depends on it.
"""

import hashlib
import json
from dataclasses import dataclass
from enum import Enum
from typing import Any

from pydantic import BaseModel, ConfigDict
from pydantic.fields import FieldInfo


class Changes(Enum):
    """What is different about a run when the field is different."""

    MATHEMATICS = "mathematics"
    """The numbers that training computes: part of the run id."""
    DATA = "data"
    """What is prepared for training: part of the prepared data's key; the run id has the content hash instead."""
    PERFORMANCE = "performance"
    """Time and memory only."""
    SURFACE = "surface"
    """Names, places, how much is shown."""


@dataclass(frozen=True)
class Added:
    """In the annotation of a field that came after the first schema: since which version, and the value that does what
    was done before. Old frozen configs get that value; identities leave the field out where it has it, so that a run
    keeps its id when the schema grows."""

    version: int
    before: Any


@dataclass(frozen=True)
class NameOf:
    """In the annotation of a field that names what lies outside the config, a file or a model: what changes when that
    changes. The run id has the hash of the content, not the name: another name is another run only where another
    content is behind it."""

    changes: Changes


class Settings(BaseModel):
    """A group of settings: unknown keys refused, frozen, no silent conversion of types, no infinity."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        strict=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
        defer_build=True,  # only TrainConfig validates: one validator to build instead of one for each class
    )

    def fields_that_change(self, *effects: Changes) -> dict[str, Any]:
        """The nested dictionary of the fields, at any depth, whose annotation is one of `effects`, but for those that
        were `Added` and do what was done before."""
        found: dict[str, Any] = {}
        for name, field in type(self).model_fields.items():
            value = getattr(self, name)
            if isinstance(value, Settings):
                if inner := value.fields_that_change(*effects):
                    found[name] = inner
            elif any(effect in field.metadata for effect in effects) and not _as_before(field, value):
                found[name] = list(value) if isinstance(value, tuple) else value
        return found


def _as_before(field: FieldInfo, value: Any) -> bool:
    return any(isinstance(note, Added) and note.before == value for note in field.metadata)


def content_hash(value: Any) -> str:
    """SHA-256, in hex, of `value` as canonical JSON (sorted keys, no spaces, no NaN)."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()
