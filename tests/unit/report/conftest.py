from pathlib import Path

import pytest

from tests.paper_run import PaperRuns, write_runs


@pytest.fixture
def runs(tmp_path: Path) -> PaperRuns:
    return write_runs(tmp_path / "outputs")
