"""Files that are damaged: nothing is lost, the words are clear, the next run goes on.

Each run is compared, at its end, with one whose files were whole: weights, optimizer, random generators, rows, tracker,
registry and journal.
"""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.faults.compare import the_run
from tests.faults.disturbed import TRAIN, again, contents, cut_in_half, flip_a_bit, run
from tests.faults.runs import DPO, PRETRAIN_NAME


@pytest.mark.parametrize(
    ("file", "damage"),
    [
        ("state.pt", flip_a_bit),
        ("state.pt", cut_in_half),
        ("manifest.json", Path.unlink),
    ],
)
def test_a_damaged_checkpoint_costs_one_interval(
    file: str, damage: Callable[[Path], None], interrupted: Path, undisturbed: Path
) -> None:
    newest = the_run(interrupted, PRETRAIN_NAME) / "checkpoints" / "step-00000006"
    damage(newest / file)
    output = again(interrupted, undisturbed, continuing="continuing from step-00000003")
    assert f"passing over a damaged checkpoint: {newest.relative_to(interrupted)}" in output


@pytest.mark.parametrize(
    ("pattern", "damage"),
    [
        ("data/*/train-00000.uint16", flip_a_bit),
        ("data/*/train-00000.uint16", cut_in_half),
        ("data/*/documents.jsonl", flip_a_bit),
        ("data/*/manifest.json", cut_in_half),
        ("tokenizers/*/chat_template.jinja", flip_a_bit),
        ("tokenizers/*/tokenizer.json", cut_in_half),
    ],
)
def test_damaged_prepared_data_stop_a_continued_run_and_are_made_anew_once_deleted(
    pattern: str, damage: Callable[[Path], None], interrupted: Path, undisturbed: Path
) -> None:
    (damaged,) = (interrupted / "outputs").glob(pattern)
    damage(damaged)
    before = contents(the_run(interrupted, PRETRAIN_NAME) / "checkpoints")
    code, output = run(interrupted)
    assert code == 3, output
    assert str(damaged.parent.relative_to(interrupted)) in output
    assert "delete" in output
    assert contents(the_run(interrupted, PRETRAIN_NAME) / "checkpoints") == before
    shutil.rmtree(damaged.parent)
    again(interrupted, undisturbed, continuing="continuing from step-00000006")


def test_no_pairs_are_cut_from_damaged_documents(undisturbed: Path, tmp_path: Path) -> None:
    shutil.copytree(undisturbed, tmp_path / "here", symlinks=True)
    (documents,) = (tmp_path / "here" / "outputs").glob("data/*/documents.jsonl")
    flip_a_bit(documents)
    code, output = run(tmp_path / "here", words=("train", *DPO))
    assert code == 3, output
    assert f"{documents.relative_to(tmp_path / 'here')} has changed since it was written; delete" in output
    assert [path for path in documents.parent.parent.iterdir() if path.is_dir()] == [documents.parent]


def test_damaged_baselines_are_measured_anew_once_deleted(interrupted: Path, undisturbed: Path) -> None:
    baselines = the_run(interrupted, PRETRAIN_NAME) / "baselines.json"
    cut_in_half(baselines)
    code, output = run(interrupted)
    assert code == 3, output
    assert f"{baselines.relative_to(interrupted)} is damaged" in output
    baselines.unlink()
    again(interrupted, undisturbed, continuing="continuing from step-00000006")


@pytest.mark.parametrize("tracking", ["mlflow", "none"])
def test_a_garbled_row_of_metrics_is_named_before_training_and_the_restored_file_continues(
    tracking: str, interrupted: Path, undisturbed: Path
) -> None:
    metrics = the_run(interrupted, PRETRAIN_NAME) / "metrics.jsonl"
    whole = metrics.read_bytes()
    first, _, rest = whole.partition(b"\n")
    metrics.write_bytes(b"?" * len(first) + b"\n" + rest)
    before = contents(metrics.parent / "checkpoints")
    code, output = run(interrupted, words=(*TRAIN, f"tracking={tracking}"))
    assert code == 3, output
    assert f"{metrics.relative_to(interrupted)}:1: not a row of metrics" in output
    assert "restore it" in output
    assert contents(metrics.parent / "checkpoints") == before
    if tracking == "none":
        return
    metrics.write_bytes(whole)
    again(interrupted, undisturbed, continuing="continuing from step-00000006")


def test_a_garbled_database_stops_no_training_and_once_restored_it_gets_all_rows(
    interrupted: Path, undisturbed: Path
) -> None:
    database = interrupted / "outputs" / "mlflow" / "mlflow.db"
    whole = database.read_bytes()
    database.write_bytes(b"\xff" * len(whole))
    code, output = run(interrupted)
    assert code == 2, output
    assert "training goes on and sends the rows later" in output
    assert f"{database} cannot be opened: file is not a database\n" in output
    assert "restore it from a backup" in output
    assert (the_run(interrupted, PRETRAIN_NAME) / "checkpoints" / "step-00000008").exists()
    database.write_bytes(whole)
    again(interrupted, undisturbed, continuing="continuing from step-00000008")


def test_a_database_that_is_gone_is_made_anew_with_all_rows(interrupted: Path, undisturbed: Path) -> None:
    (interrupted / "outputs" / "mlflow" / "mlflow.db").unlink()
    assert "first use" in again(interrupted, undisturbed, continuing="continuing from step-00000006")
