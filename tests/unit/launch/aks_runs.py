"""Frozen runs for an AKS cluster, made without preparing data."""

from pathlib import Path

from llmtrain.config.compose import load_config
from llmtrain.config.frozen import FrozenRun, Resolved
from llmtrain.config.root import TrainConfig
from llmtrain.launch.engine import Run

IMAGE = "registry.example/llmtrain@sha256:" + "ab" * 32
NOTHING = Resolved(
    tokenizer_path="tokenizers/0", tokenizer_sha256="0", text_path="data/0", text_sha256="0", pairs_path=None,
    pairs_sha256=None, parent_version=None, parent_path=None, parent_weights_sha256=None,
)  # fmt: skip


def run(*overrides: str, outputs: Path = Path("outputs")) -> Run:
    """A run of `infra=aks_cpu`, or of what the overrides say."""
    chosen = [] if any(one.startswith("infra=") for one in overrides) else ["infra=aks_cpu"]
    if not any(one.startswith("infra.launch.image=") for one in overrides):
        chosen.append(f"infra.launch.image={IMAGE}")
    return frozen(load_config(["model=qwen3_tiny", *chosen, *overrides]), outputs)


def frozen(config: TrainConfig, outputs: Path = Path("outputs")) -> Run:
    """The run of `config`."""
    run = FrozenRun(config=config, resolved=NOTHING, attempt=1)
    return Run(outputs / config.name / run.run_id, run)
