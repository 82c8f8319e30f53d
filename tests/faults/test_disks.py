"""Disks that are full or read-only, real ones: nothing is lost, the words are clear, the next run goes on."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults import faults
from tests.faults.compare import assert_runs_equal
from tests.faults.disturbed import FIRST_ROW, SAVE, TRAIN, again, contents, run
from tests.faults.faults import Before
from tests.faults.runs import PRETRAIN_NAME


class Disk:
    """A disk of its own for a test's outputs."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def mount(self, options: str) -> None:
        """Mount, or change, with `mount`'s options."""
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(self.directory)]
        subprocess.run([*AS_ROOT, *command], check=True, capture_output=True)

    def unmount(self) -> None:
        subprocess.run([*AS_ROOT, "umount", "--lazy", str(self.directory)], check=True)


AS_ROOT = [] if os.geteuid() == 0 else ["sudo", "--non-interactive"]


@pytest.fixture
def disk(beginning: Path, tmp_path: Path) -> Iterator[Disk]:
    """An empty disk at `outputs` of a working directory, large enough for a run."""
    here = tmp_path / "mounted"
    shutil.copytree(beginning / "text", here / "text")
    (here / "outputs").mkdir()
    disk = Disk(here / "outputs")
    try:
        disk.mount("size=32m")
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"needs the right to mount a tmpfs (root, or sudo without a password): {error}")
    yield disk
    disk.unmount()


@pytest.mark.parametrize("size", ["64k", "1m"])
def test_a_run_goes_on_when_a_small_disk_grows(size: str, disk: Disk, undisturbed: Path) -> None:
    disk.mount(f"remount,size={size}")
    here = disk.directory.parent
    code, output = run(here)
    assert code == 75, output
    assert "disk is full\nFree some space" in output
    assert "run the same command again; what is saved stays\n" in output
    disk.mount("remount,size=32m")
    again(here, undisturbed)


@pytest.mark.parametrize(
    ("function", "call", "room", "place", "continuing"),
    [
        ("llmtrain.data.text:ShardWriter.append", 5, 0, "outputs/data/", "prepared 24 documents"),
        ("llmtrain.telemetry.database:_create", 1, 0, "mlflow.db", ""),
        ("llmtrain.telemetry.metrics:MetricsFile.append", 1, 0, "/metrics.jsonl", ""),
        (SAVE, 2, 300_000, "checkpoints/step-00000006", "continuing from step-00000003"),
        ("llmtrain.models.directory:save", 1, 300_000, "/model", "continuing from step-00000008"),
        ("llmtrain.training.run:plot_curves", 1, 0, "/curves.png", "continuing from step-00000008"),
        ("llmtrain.registry.registry:Registry.register", 1, 0, "mlflow.db", "continuing from step-00000008"),
    ],
)
def test_a_disk_that_is_full_for_a_moment_costs_nothing(
    function: str,
    call: int,
    room: int,
    place: str,
    continuing: str,
    disk: Disk,
    undisturbed: Path,
    beginning: Path,
) -> None:
    here = disk.directory.parent
    if "_create" not in function:
        shutil.copytree(beginning / "outputs", disk.directory, dirs_exist_ok=True)
    code, output = run(here, Before(function, call, faults.fill, (disk.directory, room)))
    assert code == 75, output
    fact = next(line for line in output.splitlines() if line.endswith("disk is full"))
    assert place in fact, output
    assert "Free some space" in output
    faults.empty(disk.directory)
    again(here, undisturbed, continuing)


def test_rows_wait_while_the_trackers_disk_is_full(disk: Disk, undisturbed: Path, beginning: Path) -> None:
    here = disk.directory.parent
    shutil.copytree(beginning / "outputs", disk.directory, dirs_exist_ok=True)
    moments = (Before(*FIRST_ROW, faults.fill, (disk.directory,)), Before(SAVE, 1, faults.empty, (disk.directory,)))
    code, output = run(here, *moments)
    assert code == 0, output
    assert "mlflow.db: database or disk is full); training goes on and sends the rows later" in output
    assert_runs_equal(undisturbed, here, PRETRAIN_NAME)


def test_a_file_that_may_not_become_so_large_is_named(fresh: Path, undisturbed: Path) -> None:
    code, output = run(fresh, Before(SAVE, 1, faults.limit_files, (500_000,)))
    assert code == 75, output
    assert "checkpoints/step-00000003: a file may not become that large\nRaise the limit (`ulimit -f`" in output
    again(fresh, undisturbed)


def test_a_read_only_disk_is_named_and_nothing_changes(disk: Disk, interrupted: Path, undisturbed: Path) -> None:
    here = disk.directory.parent
    shutil.copytree(interrupted / "outputs", disk.directory, dirs_exist_ok=True, symlinks=True)
    before = contents(disk.directory)
    disk.mount("remount,ro")
    code, output = run(here)
    assert code == 2, output
    assert "the file system is read-only\nMake it writable, or choose another place" in output
    assert "outputs_dir=DIRECTORY" in output
    assert contents(disk.directory) == before
    disk.mount("remount,rw")
    again(here, undisturbed, continuing="continuing from step-00000006")
    disk.mount("remount,ro")
    code, output = run(here, words=("models",))
    assert code == 0, output
    assert "1.0.0" in output


def test_outputs_that_are_a_file_are_named(beginning: Path, tmp_path: Path) -> None:
    shutil.copytree(beginning / "text", tmp_path / "text")
    (tmp_path / "notes").write_text("mine")
    for outputs in ("notes", "notes/inside"):
        code, output = run(tmp_path, words=(*TRAIN, f"outputs_dir={outputs}"))
        assert code == 2, output
        assert "a file stands where a directory is needed\nMove it away, or choose another place" in output
    assert (tmp_path / "notes").read_text() == "mine"
