"""Models to register."""

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from llmtrain.artifacts import TrainedModel, weights_sha256


@pytest.fixture(scope="session")
def trained():
    """A finished run's record, with the weights it names in `outputs` where one is given."""

    def build(run_id: str = "run1", outputs: Path | None = None, **changed: object) -> TrainedModel:
        path = f"demo/{run_id}/model"
        weights = f"weights of {run_id}"
        if outputs is not None:
            (outputs / path).mkdir(parents=True)
            save_file({"w": np.frombuffer(run_id.encode(), np.uint8)}, outputs / path / "model.safetensors")
            weights = weights_sha256(outputs / path)
        fields = {
            "parents": (),
            "run_id": run_id,
            "path": path,
            "trainer": "pretrain",
            "shape_sha256": "shape",
            "weights_sha256": weights,
            "tokenizer_sha256": "tokenizer",
            "config_sha256": "config",
            "dataset_sha256": "dataset",
            "recipe_sha256": "recipe",
            "parent_version": None,
            "num_tokens_seen": 1_000_000,
            "metrics": {"test/loss_nats": 3.25, "test/bits_per_byte": 1.5},
        }
        return TrainedModel(**{**fields, **changed})

    return build
