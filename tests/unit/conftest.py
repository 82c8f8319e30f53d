"""One migrated MLflow database per test session, which takes seconds to make; each test that asks has a copy."""

import shutil
from pathlib import Path

import pytest

from llmtrain.telemetry.database import database_path, open_database


@pytest.fixture(scope="session")
def migrated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Outputs with an empty registry."""
    outputs = tmp_path_factory.mktemp("migrated")
    open_database(outputs)
    return outputs


@pytest.fixture
def outputs(migrated: Path, tmp_path: Path) -> Path:
    outputs = tmp_path / "outputs"
    database_path(outputs).parent.mkdir(parents=True)
    shutil.copyfile(database_path(migrated), database_path(outputs))
    return outputs
