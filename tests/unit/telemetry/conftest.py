"""One migrated MLflow database per test session; each test has a copy."""

import shutil
from pathlib import Path

import pytest

from llmtrain.telemetry.database import database_path, open_database


@pytest.fixture(scope="session")
def migrated(tmp_path_factory) -> Path:
    outputs = tmp_path_factory.mktemp("migrated")
    open_database(outputs)
    return outputs


@pytest.fixture
def outputs(migrated, tmp_path) -> Path:
    outputs = tmp_path / "outputs"
    database_path(outputs).parent.mkdir(parents=True)
    shutil.copyfile(database_path(migrated), database_path(outputs))
    return outputs
