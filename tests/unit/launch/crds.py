"""Judges of objects whose kinds are not Kubernetes' own, by the schemas in tests/golden/aks/crds."""

from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import yaml

CRDS = Path(__file__).parents[2] / "golden" / "aks" / "crds"
VERSIONS = {"kueue": "kueue.x-k8s.io/v1beta2", "jobset": "jobset.x-k8s.io/v1alpha2"}


def judged(item: dict, crd: str) -> None:
    """Raises jsonschema.ValidationError where `item` breaks the schema of its kind, or has a key that it lacks."""
    assert item["apiVersion"] == VERSIONS[crd]
    jsonschema.Draft202012Validator(schema(crd, item["kind"])).validate(item)


def judged_job_set(item: dict, kubernetes: str) -> None:
    """A JobSet, and its Job by the schemas of that version of Kubernetes too; raises as they do."""
    judged(item, "jobset")
    for group in item["spec"]["replicatedJobs"]:
        job = {"apiVersion": "batch/v1", "kind": "Job", **group["template"]}
        kubernetes_validate.validate(job, kubernetes, strict=True)


@cache
def schema(crd: str, kind: str) -> dict:
    found = strict(yaml.safe_load((CRDS / f"{crd}.yaml").read_text())[kind])
    found["properties"]["metadata"] = {"type": "object"}
    return found


def strict(schema: Any) -> Any:
    """A CRD's schema that refuses unknown keys, as the API server's field validation does."""
    if isinstance(schema, list):
        return [strict(one) for one in schema]
    if not isinstance(schema, dict):
        return schema
    found = {key: strict(value) for key, value in schema.items()}
    if isinstance(found.get("properties"), dict) and found.get("type") == "object" and found["properties"]:
        found.setdefault("additionalProperties", False)
    if found.pop("x-kubernetes-int-or-string", False):
        found |= {"type": ["integer", "string"]}
    return found
