"""The model card: what a person who finds the directory needs to know, in Hugging Face's form."""

from llmtrain.artifacts import DatasetManifest
from llmtrain.config.adapter import NoAdapter
from llmtrain.config.frozen import FrozenRun
from llmtrain.config.model import HFModel, Qwen3Model, SmolLM2Model
from llmtrain.models.pretrained import is_on_the_hub

TAUGHT = {
    "pretrain": "A base model: it continues text; it was not taught to follow instructions or to be safe.",
    "sft": "It continues text and was shown how to answer in chats; it was not taught to be safe.",
    "dpo": "It continues text and prefers the kind of answers it was shown; it was not taught to be safe.",
    "distill": "It continues text as its teacher does; it was not taught to follow instructions or to be safe.",
}
PUBLISHED = "What the model that it started from was taught, its own card says. This training added {kind}."


def model_card(frozen: FrozenRun, manifests: list[DatasetManifest], figures: dict[str, float]) -> str:
    """Markdown with a metadata head. `figures` are the last ones, on the test split, beside their baselines."""
    config, resolved = frozen.config, frozen.resolved
    kind = config.trainer.kind
    sources = {name: licence for manifest in manifests for name, licence in manifest.sources.items()}
    rows = "\n".join(f"| {name} | {value:.4f} |" for name, value in sorted(figures.items()))
    data = "\n".join(f"- {name}: {licence}" for name, licence in sorted(sources.items()))
    taught = TAUGHT[kind] if isinstance(config.model, Qwen3Model) else PUBLISHED.format(kind=kind)
    adapted = "" if isinstance(config.adapter, NoAdapter) else f" with adapter={config.adapter.kind}, merged"
    return f"""---
library_name: transformers
pipeline_tag: text-generation
tags: [llmtrain, {kind}]
---
# {config.name}

A {config.model.kind} model ({config.model.name}), trained by `trainer={kind}`{adapted}, {_origin(frozen)}.
{taught}

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
| chats | {resolved.chats_sha256 or "none"} |
| tokenizer | {resolved.tokenizer_sha256} |
| parent's weights | {resolved.parent_weights_sha256 or "none"} |
| teacher's weights | {resolved.teacher_weights_sha256 or "none"} |
"""


def _origin(frozen: FrozenRun) -> str:
    """What training started from, in words."""
    model, resolved = frozen.config.model, frozen.resolved
    if resolved.parent_version:
        return f"tuned from {resolved.parent_version}"
    match model:
        case HFModel():
            if not is_on_the_hub(model):  # as seen from outputs: the card names no directory of this machine
                return f"tuned from {resolved.parent_path}"
            return f"tuned from {model.path}" + (f" at revision {model.revision}" if model.revision else "")
        case SmolLM2Model():
            return "tuned from SmolLM2-135M-Instruct (Apache-2.0), unpacked from Q4_1"
        case Qwen3Model():
            return f"tuned from {resolved.parent_path}" if resolved.parent_path else "from scratch"
