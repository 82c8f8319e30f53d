"""`llmtrain diff`: its three ways to compare, and what it says where it cannot."""

import json
import shutil
from pathlib import Path

import pytest

from llmtrain.cli.main import main as llmtrain
from tests.unit.diff.conftest import Diff, History, diff, history

__all__ = ["diff", "history"]  # fixtures
FROZEN = Path(__file__).parents[2] / "golden" / "frozen"


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[str, str]:
    """Two runs that differ in the learning rate and in their data."""
    for name in ("a", "b"):
        (tmp_path / "outputs" / "x" / name).mkdir(parents=True)
    shutil.copy(FROZEN / "v2-pretrain.json", tmp_path / "outputs" / "x" / "a" / "config.json")
    other = json.loads((FROZEN / "v2-pretrain.json").read_text())
    other["config"]["trainer"]["lr"] = 0.25
    other["resolved"]["text_sha256"] = "0" * 64
    (tmp_path / "outputs" / "x" / "b" / "config.json").write_text(json.dumps(other))
    monkeypatch.chdir(tmp_path)
    return "outputs/x/a", "outputs/x/b"


def test_two_runs(runs: tuple[str, str], diff: Diff):
    lines = diff(*runs).splitlines()
    assert lines[0] == "outputs/x/a -> outputs/x/b"
    assert lines[1].startswith("two runs, 451c1ee774cb and ")
    assert lines[1].endswith(": the mathematics differ")
    assert lines[3] == "changes the mathematics"
    assert any(line.split()[:1] == ["trainer.lr"] and line.endswith("-> 0.25") for line in lines)
    assert any(line.split()[:1] == ["resolved.text_sha256"] for line in lines[lines.index("changes the data") :])
    assert diff(f"{runs[0]}/config.json", runs[0]).splitlines()[1] == "the same run, 451c1ee774cb: nothing differs"


def test_two_command_lines(diff: Diff, repository: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(repository)
    text = diff("trainer.lr=1e-3", "--", "trainer.lr=3e-3", "infra.threads=1")
    assert text.splitlines()[:5] == [
        "trainer.lr=1e-3 -> trainer.lr=3e-3 infra.threads=1",
        "another run: the mathematics differ, so the run id changes",
        "",
        "changes the mathematics",
        "  trainer.lr  0.001 -> 0.003   override 'trainer.lr=3e-3'",
    ]
    assert "performance only\n  infra.threads  null -> 1   override 'infra.threads=1'" in text
    found = json.loads(diff("--json", "trainer.lr=1e-3", "--", "trainer.lr=3e-3"))
    assert found["verdict"]["is_another_run"] is True
    assert found["differences"] == [
        {
            "key": "trainer.lr",
            "changes": "mathematics",
            "only": None,
            "before": 0.001,
            "after": 0.003,
            "meaning": "Peak learning rate, reached after the warm-up.",
            "set_by_before": "override 'trainer.lr=1e-3'",
            "set_by_after": "override 'trainer.lr=3e-3'",
            "names_content": False,
        }
    ]
    (curve,) = found["derived"]["quantities"]
    assert (curve["name"], len(curve["before"])) == ("learning rate", 10)
    assert curve["after"][-1] == pytest.approx(0.1 * 3e-3)  # min_lr_share of the peak
    assert "| `trainer.lr` | `0.001` | `0.003` |" in diff("--markdown", "trainer.lr=1e-3", "--", "trainer.lr=3e-3")
    assert diff("--").splitlines()[1] == "the same: nothing differs"


def test_two_revisions_under_the_same_overrides(history: History, diff: Diff):
    history.edit("conf/trainer/pretrain.yaml", "lr: 4.0e-3", "lr: 2.0e-3")
    second = history.commit()
    lines = diff("main^1..HEAD", "experiment=smoke").splitlines()
    assert lines[0].endswith(f"-> HEAD ({second[:9]})")
    assert "  trainer.lr  0.004 -> 0.002   conf/trainer/pretrain.yaml:6" in lines
    same = diff("main^1..HEAD", "experiment=smoke", "trainer.lr=1e-3").splitlines()
    assert same[1] == "the same: nothing differs"


def test_a_revision_and_the_working_tree(history: History, diff: Diff):
    history.edit("conf/trainer/pretrain.yaml", "lr: 4.0e-3", "lr: 2.0e-3")
    lines = diff("main..").splitlines()
    assert lines[0].endswith("-> the working tree")
    assert "  trainer.lr  0.004 -> 0.002   conf/trainer/pretrain.yaml:6" in lines


def test_three_dots_begin_where_the_branch_left(history: History, diff: Diff):
    history.git("checkout", "-q", "-b", "work")
    history.edit("conf/trainer/pretrain.yaml", "lr: 4.0e-3", "lr: 2.0e-3")
    history.commit()
    history.git("checkout", "-q", "main")
    history.edit("conf/trainer/pretrain.yaml", "weight_decay: 0.1", "weight_decay: 0.2")
    history.commit()
    assert "trainer.weight_decay" not in diff("main...work")
    assert "trainer.weight_decay" in diff("main..work")


def test_own_options_are_those_of_the_revision(history: History, diff: Diff):
    own = history.top / "mine" / "experiment" / "own.yaml"
    own.parent.mkdir(parents=True)
    own.write_text("# @package _global_\ntrainer:\n  lr: 1.0e-3\n")
    history.commit()
    own.write_text("# @package _global_\ntrainer:\n  lr: 5.0e-3\n")
    text = diff("main..", "experiment=own", "--config-dir", "mine")
    assert "  trainer.lr  0.001 -> 0.005   mine/experiment/own.yaml:3" in text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("mian..HEAD", "mian: no such revision"),
        ("--upload-pack=x..HEAD", "--upload-pack: no such flag"),
        ("..HEAD", "..HEAD: name the revision to compare with; write 'main..HEAD'"),
        ("main.. trainer.lrr=3", "trainer.lrr: no such setting; did you mean 'trainer.lr'"),
        ("trainer.lr=1 -- trainer.lrr=3", "trainer.lrr=3: 1 problem"),
        ("trainer.lr=1e-3", "nothing to compare: got overrides without '--'"),
        ("", "nothing to compare: got nothing"),
        ("a b c", "nothing to compare: got 3 names (a, b, c)"),
        ("nowhere/a nowhere/b", "nowhere/a: no frozen config to start from"),
        ("conf conf", "conf/config.json: no frozen config to start from"),
        ("a b trainer.lr=1", "a run's config is frozen; leave out 'trainer.lr=1'"),
        ("a -- trainer.lr=1", "a: only overrides stand beside '--'"),
        ("--json --markdown main..", "--markdown and --json exclude each other"),
        ("--pull-request main..HEAD trainer.lr=1", "leave out 'trainer.lr=1'"),
        ("--pull-request main..mian", "mian: no such revision"),
        ("--jsn main..", "--jsn: no such flag; did you mean '--json'?"),
    ],
)
@pytest.mark.usefixtures("history")
def test_a_mistake_ends_with_2_and_the_next_step(words: str, message: str, capsys: pytest.CaptureFixture[str]):
    assert llmtrain(["diff", *words.split()]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert message in printed.err


@pytest.mark.parametrize("words", [["main..HEAD"], ["--pull-request", "main..HEAD"]])
def test_outside_a_repository(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert llmtrain(["diff", *words]) == 2
    assert "is in no git repository" in capsys.readouterr().err


def test_without_git(history: History, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setenv("PATH", str(history.top))
    assert llmtrain(["diff", "main.."]) == 2
    assert "git is not installed" in capsys.readouterr().err


def test_histories_without_a_common_commit(history: History, capsys: pytest.CaptureFixture[str]):
    history.git("checkout", "-q", "--orphan", "other")
    history.edit("conf/trainer/pretrain.yaml", "lr: 4.0e-3", "lr: 2.0e-3")
    history.commit()
    assert llmtrain(["diff", "main...other"]) == 2
    assert "no commit in common; write 'main..other'" in capsys.readouterr().err


def test_help_shows_the_three_ways(diff: Diff):
    lines = diff("--help").splitlines()
    assert sum(line.startswith("llmtrain diff ") for line in lines) == 3
