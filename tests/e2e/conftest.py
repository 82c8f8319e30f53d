"""The demo's outputs: made once, by the README's first command, and used by the tests that follow."""

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest


@dataclass(frozen=True)
class Demo:
    directory: Path
    """Where the commands are typed: it has `outputs` and a `train.py`."""
    output: str

    @property
    def outputs(self) -> Path:
        return self.directory / "outputs"


def shell(command: str, directory: Path) -> subprocess.CompletedProcess[str]:
    """Run a line as a user would, with the virtual environment of the tests activated; stderr goes to stdout."""
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    environment.pop("OMP_NUM_THREADS", None)
    return subprocess.run(
        ["bash", "-c", command],
        cwd=directory,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=1500,
        check=False,
    )


@pytest.fixture(scope="session")
def demo(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Demo:
    directory = tmp_path_factory.mktemp("demo")
    (directory / "train.py").symlink_to(repository / "train.py")
    done = shell(f"{repository}/scripts/demo --outputs outputs", directory)
    assert done.returncode == 0, done.stdout[-5000:]
    return Demo(directory, done.stdout)
