"""A checkpoint is whole or does not count."""

from pathlib import Path

import pytest
import torch

from llmtrain.errors import IntegrityError
from llmtrain.training import checkpoints
from llmtrain.training.checkpoints import AtomicCheckpoints


def save(directory: Path, step: int) -> Path:
    path = directory / f"step-{step:08d}"
    AtomicCheckpoints().save_checkpoint({"weights": torch.full((3,), float(step))}, path)
    return path


def test_what_is_saved_is_what_is_loaded(tmp_path: Path):
    state = AtomicCheckpoints().load_checkpoint(save(tmp_path, 7))
    assert state["weights"].tolist() == [7.0, 7.0, 7.0]
    assert checkpoints.step_of(tmp_path / "step-00000007") == 7


def test_newest_is_the_one_with_most_steps(tmp_path: Path):
    for step in (9, 100, 20):
        save(tmp_path, step)
    found = checkpoints.newest(tmp_path)
    assert found is not None
    assert found.name == "step-00000100"


def test_no_checkpoint_is_none(tmp_path: Path):
    assert checkpoints.newest(tmp_path / "absent") is None


@pytest.mark.parametrize(
    "damage", ["flip", "truncate", "remove", "no manifest", "empty manifest", "manifest of nothing"]
)
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(tmp_path: Path, damage: str, capsys):
    save(tmp_path, 1)
    newest = save(tmp_path, 2)
    state = newest / "state.pt"
    content = bytearray(state.read_bytes())
    match damage:
        case "flip":
            content[len(content) // 2] ^= 1
            state.write_bytes(content)
        case "truncate":
            state.write_bytes(content[:-1])
        case "remove":
            state.unlink()
        case "no manifest":
            (newest / "manifest.json").unlink()
        case "empty manifest":
            (newest / "manifest.json").write_text("")
        case "manifest of nothing":
            (newest / "manifest.json").write_text("{}")
    with pytest.raises(IntegrityError):
        AtomicCheckpoints().load_checkpoint(newest)
    found = checkpoints.newest(tmp_path)
    assert found is not None
    assert found.name == "step-00000001"
    assert "step-00000002" in capsys.readouterr().err


def test_half_written_directories_do_not_count_and_are_removed(tmp_path: Path):
    save(tmp_path, 1)
    half = tmp_path / "step-00000002.writing"
    half.mkdir()
    (half / "state.pt").write_bytes(b"half")
    found = checkpoints.newest(tmp_path)
    assert found is not None
    assert found.name == "step-00000001"
    checkpoints.prune(tmp_path)
    assert not half.exists()


def test_prune_keeps_the_newest_two_and_the_best(tmp_path: Path):
    for step in range(1, 6):
        save(tmp_path, step)
    checkpoints.mark_best(tmp_path / "step-00000002")
    checkpoints.prune(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "best",
        "step-00000002",
        "step-00000004",
        "step-00000005",
    ]
    assert (tmp_path / "best" / "state.pt").exists()
    checkpoints.mark_best(tmp_path / "step-00000005")
    checkpoints.prune(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["best", "step-00000004", "step-00000005"]


def test_a_checkpoint_never_executes_code_when_loaded(tmp_path: Path):
    class Payload:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "executed",))

    path = tmp_path / "step-00000001"
    AtomicCheckpoints().save_checkpoint({"payload": Payload()}, path)
    with pytest.raises(Exception, match=r"[Ww]eights.only"):
        AtomicCheckpoints().load_checkpoint(path)
    assert not (tmp_path / "executed").exists()
