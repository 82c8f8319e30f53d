"""Places in messages are relative to the working directory: the repository, as for whoever types the command there."""

from collections.abc import Callable
from pathlib import Path

import pytest

from llmtrain.config.compose import Composer


@pytest.fixture(autouse=True)
def _in_the_repository(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(repository)


@pytest.fixture(scope="session")
def composer() -> Composer:
    return Composer(files_stay=True)


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str, str], Path]:
    """Write one of the user's own option files under `tmp_path`."""

    def write_option(name: str, text: str) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return path

    return write_option
