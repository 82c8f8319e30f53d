"""The lineage of registered models as text."""

from llmtrain.artifacts import ModelVersion


def tree(versions: list[ModelVersion]) -> str:
    """One line a version, below the version that its training started from, in the order of `versions`.

    A version whose parent is not among them stands at the left and names its parent.
    """
    children: dict[str | None, list[ModelVersion]] = {}
    labels = {version.label for version in versions}
    for version in versions:
        parent = version.model.parent_version
        children.setdefault(parent if parent in labels else None, []).append(version)
    lines: list[tuple[str, ModelVersion]] = []

    def add(parent: str | None, indent: str) -> None:
        siblings = children.get(parent, [])
        for version in siblings:
            last = version is siblings[-1]
            branch, below = ("", "") if parent is None else ("└── ", "    ") if last else ("├── ", "│   ")
            lines.append((indent + branch + version.label, version))
            add(version.label, indent + below)

    add(None, "")
    width = max((len(name) for name, _ in lines), default=0)
    return "\n".join(f"{name:{width}}  {_facts(version, labels)}" for name, version in lines)


def _facts(version: ModelVersion, labels: set[str]) -> str:
    model = version.model
    facts = [f"{model.trainer:8}", f"{model.num_tokens_seen:>13,} tokens", version.registered_at_utc[:10]]
    facts += [f"{key} {value:.4g}" for key, value in list(model.metrics.items())[:2]]
    if model.parent_version is not None and model.parent_version not in labels:
        facts.append(f"(from {model.parent_version}, not listed)")
    return "  ".join(facts)
