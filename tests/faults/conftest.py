"""One fork server for all tests of faults, the runs that most of them disturb, and the kills, counted, at their end."""

import contextlib
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

from llmtrain.cli.train import main
from tests.faults import faults, forkserver
from tests.faults.commands import PRETRAIN, files
from tests.faults.compare import the_run
from tests.faults.disturbed import SAVE, run
from tests.faults.faults import Before
from tests.faults.runs import PRETRAIN_NAME, text


@pytest.fixture(scope="session")
def server() -> None:
    """The fork server is there."""
    forkserver.start_server()


@pytest.fixture
def show_kills(record_property: Callable[[str, object], None]) -> Callable[[list[str]], None]:
    """Call it with lines for the summary."""
    return partial(record_property, "kills")


@pytest.fixture(scope="session")
def beginning(server: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working directory with texts and an empty tracking database."""
    directory = tmp_path_factory.mktemp("beginning")
    text(directory, num_documents=24, characters=2000)
    assert forkserver.finish(forkserver.start(forkserver.create_database, directory)) == 0
    (directory / "output.txt").unlink()
    return directory


@pytest.fixture(scope="session")
def undisturbed(beginning: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working directory whose run came to its end."""
    directory = tmp_path_factory.mktemp("undisturbed") / "here"
    shutil.copytree(beginning, directory)
    code, output = run(directory)
    assert code == 0, output
    return directory


@pytest.fixture(scope="session")
def interrupted_once(beginning: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("interrupted") / "here"
    shutil.copytree(beginning, directory)
    assert run(directory, Before(SAVE, 3, faults.die))[0] < 0
    return directory


@pytest.fixture
def interrupted(interrupted_once: Path, tmp_path: Path) -> Path:
    """A working directory whose run was killed as it began to save step 8: it has the checkpoints of steps 3 and 6."""
    directory = tmp_path / "here"
    shutil.copytree(interrupted_once, directory, symlinks=True)
    kept = sorted(path.name for path in (the_run(directory, PRETRAIN_NAME) / "checkpoints").glob("step-*[0-9]"))
    assert kept == ["step-00000003", "step-00000006"]
    return directory


@pytest.fixture
def fresh(beginning: Path, undisturbed: Path, tmp_path: Path) -> Iterator[Path]:
    """A working directory with prepared data and without a run; a lock of its database ends with the test."""
    shutil.copytree(beginning, tmp_path / "here")
    for prepared in ("data", "tokenizers"):
        shutil.copytree(undisturbed / "outputs" / prepared, tmp_path / "here" / "outputs" / prepared)
    yield tmp_path / "here"
    (tmp_path / "here" / "released").touch()  # for `faults.lock`


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The empty working directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="session")
def trained_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("trained")
    text(directory, num_documents=24, characters=2000)
    with contextlib.chdir(directory):
        assert main([*PRETRAIN, *files("text/*.txt")]) == 0
    return directory


@pytest.fixture
def trained(trained_once: Path, here: Path) -> Path:
    """The working directory, with texts and a model that was pretrained on them."""
    return shutil.copytree(trained_once, here, dirs_exist_ok=True, symlinks=True)


@pytest.fixture
def fails(here: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Call it with a training command, its exit code and what must be said; the words are returned."""

    def failing(arguments: list[str], code: int, *said: str) -> str:
        capsys.readouterr()
        assert main(arguments) == code
        error = capsys.readouterr().err
        assert "Traceback" not in error
        for part in said:
            assert part in error
        return error

    return failing
