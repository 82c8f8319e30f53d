"""A frozen run that was never computed."""

import pytest

from llmtrain.config.compose import load_config
from llmtrain.config.frozen import FrozenRun, Resolved


@pytest.fixture(scope="module")
def frozen() -> FrozenRun:
    resolved = Resolved(
        tokenizer_path="", tokenizer_sha256="", text_path="", text_sha256="", pairs_path=None, pairs_sha256=None,
        parent_version=None, parent_path=None, parent_weights_sha256=None,
    )  # fmt: skip
    return FrozenRun(config=load_config(["model=qwen3_tiny"]), resolved=resolved, attempt=1)
