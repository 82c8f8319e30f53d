import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from data_samples import silent

from llmtrain.data.once import make_once
from llmtrain.errors import TryAgain

SLOW_MAKER = """
import sys, time
from pathlib import Path
from llmtrain.data.once import make_once
def make(directory):
    (directory / "part").write_text(sys.argv[2])
    print("writing", flush=True)
    time.sleep(float(sys.argv[3]))
make_once(Path(sys.argv[1]), make, lambda message: print(message, flush=True))
"""


def start(target: Path, name: str, seconds: float) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", SLOW_MAKER, str(target), name, str(seconds)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def visible(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir() if not path.name.startswith("."))


def test_a_killed_maker_leaves_nothing_that_counts_and_the_next_one_cleans_up(tmp_path: Path) -> None:
    process = start(tmp_path / "key", "first", 60)
    assert process.stdout is not None
    assert process.stdout.readline() == "writing\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert visible(tmp_path) == ["key.writing"]
    make_once(tmp_path / "other", lambda directory: (directory / "x").touch(), silent)
    assert visible(tmp_path) == ["other"]


def test_two_at_once_make_it_once_and_both_are_fine(tmp_path: Path) -> None:
    first = start(tmp_path / "key", "first", 1)
    assert first.stdout is not None
    assert first.stdout.readline() == "writing\n"
    second = start(tmp_path / "key", "second", 0)
    output, _ = second.communicate(timeout=60)
    assert (first.wait(), second.returncode) == (0, 0)
    assert output == f"waiting for another process that prepares {tmp_path / 'key'}\n"
    assert (tmp_path / "key" / "part").read_text() == "first"
    assert visible(tmp_path) == ["key"]


def test_the_directory_of_a_living_maker_is_not_removed(tmp_path: Path) -> None:
    process = start(tmp_path / "key", "first", 1)
    assert process.stdout is not None
    assert process.stdout.readline() == "writing\n"
    make_once(tmp_path / "other", lambda directory: (directory / "x").touch(), silent)
    assert process.wait() == 0
    assert visible(tmp_path) == ["key", "other"]


def test_what_exists_is_not_made_again(tmp_path: Path) -> None:
    make_once(tmp_path / "key", lambda directory: (directory / "x").write_text("1"), silent)
    start_s = time.perf_counter()
    make_once(tmp_path / "key", lambda directory: (directory / "x").write_text("2"), silent)
    assert time.perf_counter() - start_s < 0.05
    assert (tmp_path / "key" / "x").read_text() == "1"


def test_a_full_disk_asks_to_try_again_and_leaves_nothing(tmp_path: Path) -> None:
    def fill(directory: Path) -> None:
        (directory / "x").touch()
        with open("/dev/full", "w") as full:
            full.write("x")

    with pytest.raises(TryAgain, match="key: the disk is full\nFree some space"):
        make_once(tmp_path / "key", fill, silent)
    assert visible(tmp_path) == []
