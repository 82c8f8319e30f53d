"""One tiny model, trained once for all tests, and what it answers to the probes."""

from pathlib import Path

import pytest
import torch
from parity_models import CONTEXT, train

from llmtrain.data.tokenizer import load_tokenizer
from llmtrain.evaluation.parity import Reference
from llmtrain.evaluation.probes import rows
from llmtrain.models.directory import load


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("trained")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    train(directory)
    torch.set_num_threads(threads)
    return directory


@pytest.fixture(scope="session")
def reference(trained: Path) -> Reference:
    tokenizer = load_tokenizer(trained / "model")
    return Reference(load(trained / "model"), tokenizer, rows(tokenizer, CONTEXT, 32))
