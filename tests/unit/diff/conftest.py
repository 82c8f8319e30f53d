"""A git repository with conf/ and two pinned command lines."""

import os
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

PINNED = ("default", "smoke")


@dataclass(frozen=True)
class History:
    """A repository that each test changes as it likes."""

    top: Path

    def git(self, *words: str) -> str:
        identity = {"GIT_AUTHOR_NAME": "a", "GIT_AUTHOR_EMAIL": "a@b", "GIT_CONFIG_GLOBAL": os.devnull}
        identity |= {"GIT_COMMITTER_NAME": "a", "GIT_COMMITTER_EMAIL": "a@b"}
        done = subprocess.run(
            ["git", *words], cwd=self.top, env=os.environ | identity, capture_output=True, text=True, check=True
        )
        return done.stdout.strip()

    def edit(self, file: str, old: str, new: str) -> None:
        """Replace a text of a file, which must be there."""
        path = self.top / file
        text = path.read_text()
        assert old in text
        path.write_text(text.replace(old, new))

    def commit(self) -> str:
        self.git("add", "-A")
        self.git("commit", "-q", "-m", "as the test wants it")
        return self.git("rev-parse", "HEAD")


@pytest.fixture
def history(repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> History:
    """One commit on `main`; the test works in it."""
    top = tmp_path / "repository"
    shutil.copytree(repository / "conf", top / "conf")
    for name in PINNED:
        (top / "tests" / "golden").mkdir(parents=True, exist_ok=True)
        shutil.copy(repository / "tests" / "golden" / f"{name}.json", top / "tests" / "golden")
    found = History(top)
    found.git("init", "-q", "-b", "main")
    found.commit()
    monkeypatch.chdir(top)
    return found


Diff = Callable[..., str]


@pytest.fixture
def diff(capsys: pytest.CaptureFixture[str]) -> Diff:
    """`llmtrain diff` with these words; what it prints on stdout."""

    def run(*words: str) -> str:
        from llmtrain.cli.main import main

        code = main(["diff", *words])
        printed = capsys.readouterr()
        assert code == 0, printed.err
        return printed.out

    return run
