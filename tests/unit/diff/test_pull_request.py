"""The comment on a pull request, by the script that the workflows run, on histories made here."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from llmtrain.diff import derived, pull_request
from llmtrain.diff.pull_request import LABEL, MARKER, NEEDS_LABEL, Change, comment, examine
from tests.unit.diff.conftest import Diff, History

SMOKE = "conf/experiment/smoke.yaml"


@pytest.fixture
def no_plans(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plans and counts take seconds each; one test makes them."""
    monkeypatch.setattr(derived, "counted", lambda *_: {})
    monkeypatch.setattr(pull_request._Work, "_plan", lambda *_: {"steps": "some"})


def change_of(found: pull_request.PullRequest, title: str) -> Change:
    (change,) = [change for change in found.changes if change.title == title]
    return change


def test_the_script_of_the_workflows_writes_the_comment(history: History, repository: Path):
    """`scripts/config-diff` itself; only the installation that it asks for is this environment."""
    shutil.copytree(repository / "scripts", history.top / "scripts")
    (history.top / "scripts" / "setup").write_text("#!/bin/sh\n")
    python = history.top / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    history.edit(SMOKE, "budget_tokens: 100_000", "budget_tokens: 200_000")
    history.commit()
    done = subprocess.run(
        ["scripts/config-diff", "HEAD^1", "HEAD"],
        cwd=history.top,
        env=os.environ | {"PYTHONPATH": str(repository), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[:3] == [MARKER, NEEDS_LABEL, "## What this changes in conf/"]
    assert f"this needs the label `{LABEL}`" in done.stdout
    assert [line for line in lines if line.startswith("### ")] == ["### `experiment=smoke` (pinned)"]
    (budget,) = [line for line in lines if line.startswith("| `trainer.budget_tokens` |")]
    assert "| `100000` | `200000` | `conf/experiment/smoke.yaml:8` |" in budget
    assert "| steps | 390 | 781 |" in lines  # of 2 x 128 tokens
    assert "| parameters | 119,168 | 119,168 |" in lines
    assert any(line.startswith("| memory | ") and "79.1 GiB" in line for line in lines)
    for name in ("FLOPs, causal half", "FLOPs, causal in full", "time a step", "time in all", "cost"):
        assert any(line.startswith(f"| {name} | ") for line in lines)


def test_a_script_without_two_revisions_says_what_to_write(repository: Path):
    done = subprocess.run([repository / "scripts" / "config-diff", "HEAD"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "scripts/config-diff BASE HEAD" in done.stderr


def test_nothing_that_counts_has_changed(history: History, diff: Diff):
    history.edit(SMOKE, "# enough to see the loss fall", "# enough")
    history.commit()
    lines = diff("--pull-request", "HEAD^1..HEAD").splitlines()
    assert lines[0] == MARKER
    assert NEEDS_LABEL not in lines
    assert "0 differ and 4 stay as they are" in lines[3]


@pytest.mark.usefixtures("no_plans")
def test_speed_needs_no_label_and_touches_all_that_use_it(history: History):
    history.edit("conf/infra/_cpu.yaml", "micro_batch_tokens: 4096", "micro_batch_tokens: 8192")
    history.commit()
    found = examine("HEAD^1", "HEAD", history.top)
    assert not found.needs_label
    assert {change.title for change in found.changes} >= {"the defaults", "experiment=smoke"}
    assert all(change.comparison and change.comparison.verdict.is_another_run is False for change in found.changes)


@pytest.mark.usefixtures("no_plans")
def test_what_is_not_pinned_needs_no_label(history: History):
    history.edit("conf/experiment/shakespeare_char.yaml", "lr: 2.0e-3", "lr: 1.0e-3")
    history.commit()
    (change,) = examine("HEAD^1", "HEAD", history.top).changes
    assert change.title == "experiment=shakespeare_char data.corpus.paths=[STAND_IN]"
    assert not change.needs_label
    assert change.comparison is not None
    assert [one.key for one in change.comparison.differences] == ["trainer.lr"]


@pytest.mark.usefixtures("no_plans")
def test_nobody_unpins_what_they_change(history: History):
    """Neither by deleting the pin, nor by deleting the experiment, nor by making it unreadable."""
    history.git("rm", "-q", "tests/golden/smoke.json")
    history.edit(SMOKE, "budget_tokens: 100_000", "budget_tokens: 200_000")
    history.commit()
    assert change_of(examine("main^1", "main", history.top), "experiment=smoke").needs_label
    history.edit(SMOKE, "budget_tokens: 200_000", "budget_token: 100_000")
    history.commit()
    broken = change_of(examine("main~2", "main", history.top), "experiment=smoke")
    assert broken.needs_label
    assert broken.problem is not None
    assert "did you mean 'trainer.budget_tokens'? (conf/experiment/smoke.yaml:8)" in broken.problem
    history.git("rm", "-q", SMOKE)
    history.commit()
    removed = examine("main~3", "main", history.top)
    assert (change_of(removed, "experiment=smoke").only, removed.needs_label) == ("before", True)
    assert "**removed**" in comment(removed)


@pytest.mark.usefixtures("no_plans")
def test_what_is_new_is_new_even_if_it_is_pinned_at_once(history: History, repository: Path):
    text = (repository / SMOKE).read_text()
    (history.top / "conf" / "experiment" / "mine.yaml").write_text(text.replace("name: smoke", "name: mine"))
    golden = {"overrides": ["experiment=mine"], "config": {}}
    (history.top / "tests" / "golden" / "mine.json").write_text(json.dumps(golden))
    history.commit()
    found = examine("HEAD^1", "HEAD", history.top)
    (change,) = found.changes
    assert (change.title, change.only, found.needs_label) == ("experiment=mine", "after", False)


@pytest.mark.usefixtures("no_plans")
def test_a_price_changes_plans_and_no_run(history: History):
    history.edit("conf/infra/_h100.yaml", "price_per_hour: 12.29", "price_per_hour: 2.5")
    history.commit()
    found = examine("HEAD^1", "HEAD", history.top)
    assert len(found.changes) == len(found.compared)
    assert not found.needs_label
    assert "**the same: nothing differs**" in comment(found)


@pytest.mark.usefixtures("no_plans")
def test_what_a_file_says_formats_nothing(history: History):
    history.edit(SMOKE, "name: smoke", "name: 'x` | <!-- @everyone --> [a](b)\n\n# '")
    history.commit()
    (line,) = [line for line in comment(examine("HEAD^1", "HEAD", history.top)).splitlines() if "everyone" in line]
    assert "| `x\N{RIGHT SINGLE QUOTATION MARK} \N{BROKEN BAR} <!-- @everyone --> [a](b) #` |" in line


@pytest.mark.usefixtures("no_plans")
def test_a_long_comment_is_cut_between_sections(history: History, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(pull_request, "MOST_CHARACTERS", 1500)
    history.edit("conf/infra/_cpu.yaml", "micro_batch_tokens: 4096", "micro_batch_tokens: 8192")
    history.commit()
    text = comment(examine("HEAD^1", "HEAD", history.top))
    assert len(text) < 2500
    assert text.splitlines()[-1].startswith("No room for `")


@pytest.mark.usefixtures("no_plans")
def test_json_has_the_same(history: History, diff: Diff):
    history.edit(SMOKE, "budget_tokens: 100_000", "budget_tokens: 200_000")
    history.commit()
    found = json.loads(diff("--pull-request", "HEAD^1..HEAD", "--json"))
    assert (found["needs_label"], found["changes"][0]["needs_label"]) == (True, True)
    assert found["changes"][0]["comparison"]["differences"][0]["key"] == "trainer.budget_tokens"
