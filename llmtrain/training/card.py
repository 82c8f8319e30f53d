"""The model card: what a person who finds the directory needs to know, in Hugging Face's form."""

from llmtrain.artifacts import DatasetManifest
from llmtrain.config.frozen import FrozenRun


def model_card(frozen: FrozenRun, manifests: list[DatasetManifest], figures: dict[str, float]) -> str:
    """Markdown with a metadata head. `figures` are the last ones, on the test split, beside their baselines."""
    config, resolved = frozen.config, frozen.resolved
    sources = {name: licence for manifest in manifests for name, licence in manifest.sources.items()}
    rows = "\n".join(f"| {name} | {value:.4f} |" for name, value in sorted(figures.items()))
    data = "\n".join(f"- {name}: {licence}" for name, licence in sorted(sources.items()))
    origin = f"tuned from {resolved.parent_version or resolved.parent_path}" if resolved.parent_path else "from scratch"
    taught = " and prefers the kind of answers it was shown" if config.trainer.kind == "dpo" else ""
    return f"""---
library_name: transformers
pipeline_tag: text-generation
tags: [llmtrain, {config.trainer.kind}]
---
# {config.name}

A {config.model.kind} model ({config.model.name}), trained by `trainer={config.trainer.kind}`, {origin}.
A base model: it continues text{taught}; it was not taught to follow instructions or to be safe.

## Figures
Measured on the test split, which was not trained on. Losses in nats per token.

| figure | value |
|---|---|
{rows}

## Data
{data}

## Lineage
| what | hash |
|---|---|
| run | {frozen.run_id} |
| config | {frozen.sha256} |
| text | {resolved.text_sha256} |
| preferences | {resolved.pairs_sha256 or "none"} |
| tokenizer | {resolved.tokenizer_sha256} |
| parent's weights | {resolved.parent_weights_sha256 or "none"} |
"""
