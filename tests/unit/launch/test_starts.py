"""When a run is started again, and when it is given up."""

from pathlib import Path

import pytest

from llmtrain.launch import starts, work


@pytest.fixture
def run(tmp_path: Path) -> Path:
    (tmp_path / "checkpoints").mkdir()
    return tmp_path


def save(run: Path, step: int) -> None:
    (run / "checkpoints" / f"step-{step:08d}").mkdir()


def test_a_start_says_where_it_goes_on_from(run: Path):
    starts.note(run, "slurm", "12_3")
    save(run, 20)
    save(run, 100)
    (run / "checkpoints" / "step-00000120.writing").mkdir()
    (run / "checkpoints" / "best").symlink_to("step-00000020")
    starts.note(run, "slurm", "12_3")
    assert [(start.engine, start.job, start.step) for start in starts.starts(run)] == [
        ("slurm", "12_3", 0),
        ("slurm", "12_3", 100),
    ]


def test_a_line_that_a_crash_cut_short_is_no_start(run: Path):
    starts.note(run, "ray", "a")
    with (run / starts.STARTS).open("a") as file:
        file.write('{"time_utc": "2026-')
    assert len(starts.starts(run)) == 1


def test_only_starts_without_a_new_checkpoint_are_in_vain(run: Path):
    assert starts.in_vain(run) == 0
    for _ in range(3):
        starts.note(run, "slurm", "1")
    assert starts.in_vain(run) == 3
    save(run, 5)
    assert starts.in_vain(run) == 0
    starts.note(run, "slurm", "1")
    assert starts.in_vain(run) == 1


@pytest.mark.parametrize(("code", "expected"), [(0, False), (2, False), (3, False), (130, False), (75, True)])
def test_only_75_asks_for_another_start(run: Path, code: int, expected: bool):
    starts.note(run, "slurm", "1")
    assert work.again(run, code, restarts=1) == expected


def test_a_run_that_does_not_get_on_is_given_up_in_words(run: Path):
    said: list[str] = []
    for _ in range(2):
        starts.note(run, "slurm", "1")
        assert work.again(run, 75, restarts=2, say=said.append)
    starts.note(run, "slurm", "1")
    assert not work.again(run, 75, restarts=2, say=said.append)
    assert said == [
        f"{run}: 3 starts in a row have not got beyond step 0, and infra.launch.restarts=2: given up. "
        f"log.txt says why; the same command tries again"
    ]
