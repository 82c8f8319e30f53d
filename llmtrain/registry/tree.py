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
    rows: list[tuple[str, str, str, str]] = []

    def add(parent: str | None, indent: str) -> None:
        siblings = children.get(parent, [])
        for version in siblings:
            last = version is siblings[-1]
            branch, below = ("", "") if parent is None else ("└── ", "    ") if last else ("├── ", "│   ")
            tokens = f"{version.model.num_tokens_seen:,} tokens"
            rows.append((indent + branch + version.label, version.model.trainer, tokens, _facts(version, labels)))
            add(version.label, indent + below)

    add(None, "")
    names, trainers, counts = (max((len(row[column]) for row in rows), default=0) for column in range(3))
    return "\n".join(
        f"{name:{names}}  {trainer:{trainers}}  {tokens:>{counts}}  {facts}" for name, trainer, tokens, facts in rows
    )


def _facts(version: ModelVersion, labels: set[str]) -> str:
    model = version.model
    facts = [version.registered_at_utc[:10]]
    facts += [f"{key} {value:.4g}" for key, value in list(model.metrics.items())[:2]]
    if model.parent_version is not None and model.parent_version not in labels:
        facts.append(f"(from {model.parent_version}, not listed)")
    return "  ".join(facts)
