"""JSON schemas of the files in `conf/`, for editors: what an option may say, with the meaning under each key.

An option says its differences only, so nothing is required; any value may be left open (`???`) or refer to another
(`${...}`). What a whole config must have, and rules across settings, is what `llmtrain check` judges.
"""

from inspect import cleandoc
from typing import Any

from llmtrain.config.base import Settings
from llmtrain.config.root import TrainConfig
from llmtrain.config.roots import ROOTS
from llmtrain.config.schema import variants

Schema = dict[str, Any]

OPEN: Schema = {"type": "string", "pattern": r"^\?\?\?$|\$\{"}
"""A value that somebody else gives, or that refers to another."""
DEFAULTS: Schema = {
    "type": "array",
    "description": "Hydra's defaults list: what this file inherits or overrides.",
    "items": {"anyOf": [{"type": "string"}, {"type": "object", "maxProperties": 1}]},
}
HYDRA: Schema = {"type": "object", "description": "Hydra's own settings; the shipped ones switch off its files."}


def conf_schemas() -> dict[str, Schema]:
    """A schema for each group, for `experiment` (deltas over all groups of train.yaml) and for each defaults list."""
    files: dict[str, tuple[str, Schema]] = {}
    for name, root in ROOTS.items():
        groups = {group: found for group, field in root.model_fields.items() if (found := variants(field))}
        files |= {group: (f"conf/{group}/*.yaml", _group(found)) for group, found in groups.items()}
        whole = _group({"": root})
        files[name] = (f"conf/{name}.yaml", {**whole, "properties": {**whole["properties"], "hydra": HYDRA}})
    files["experiment"] = ("conf/experiment/*.yaml", _group({"": TrainConfig}))
    return {name: _file(title, schema) for name, (title, schema) in files.items()}


def _file(title: str, schema: Schema) -> Schema:
    head = {"$schema": "http://json-schema.org/draft-07/schema#", "title": title}
    return {**head, **schema, "properties": {"defaults": DEFAULTS, **schema["properties"]}}


def _group(kinds: dict[str, type[Settings]]) -> Schema:
    """An object with the keys of all kinds; with those of one, where `kind` says which."""
    found: dict[str, list[Schema]] = {}
    for group in kinds.values():
        plain = group.model_json_schema()["properties"]
        for name, field in group.model_fields.items():
            inner = variants(field)
            found.setdefault(name, []).append(_group(inner) if inner else plain[name])
    if "kind" in found:
        found["kind"] = [{"enum": list(kinds), "description": "Which settings this group has."}]
    rules = [
        {
            "if": {"properties": {"kind": {"const": kind}}, "required": ["kind"]},
            "then": {"propertyNames": {"enum": ["defaults", *group.model_fields]}},
        }
        for kind, group in kinds.items()
    ]
    return {
        "type": "object",
        "description": "\n\n".join(
            (f"{kind}: " if kind else "") + cleandoc(str(group.__doc__)) for kind, group in kinds.items()
        ),
        "properties": {name: _or_open(schemas) for name, schemas in found.items()},
        "additionalProperties": False,
        **({"allOf": rules} if len(rules) > 1 else {}),
    }


def _or_open(schemas: list[Schema]) -> Schema:
    """Any of `schemas`, or left open; what they say stands outside, where editors look."""
    said = dict.fromkeys(schema["description"] for schema in schemas if "description" in schema)
    accepted: list[Schema] = []
    for schema in schemas:
        bare = {key: value for key, value in schema.items() if key not in ("title", "description")}
        accepted += [one for one in bare.get("anyOf", [bare]) if one not in accepted]
    return {"description": "\n\n".join(said), "anyOf": [*accepted, OPEN]}
