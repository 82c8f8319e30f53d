"""A search as a person types it, on this machine's processes; its controller is killed on the way."""

import json
import os
import random
import re
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from pydoc_data.topics import topics

import pytest
from optuna.trial import TrialState

from llmtrain.cli import jobs as jobs_command
from llmtrain.launch.search import SearchDirectory
from llmtrain.launch.starts import starts
from llmtrain.launch.study import Study
from llmtrain.launch.sweeps import all_sweeps
from tests.e2e.conftest import shell
from tests.e2e.test_documented_commands import commands

TEXT = (
    "data=text_files 'data.corpus.paths=[text/*.txt]' data.corpus.licence=PSF-2.0 "
    "data.validation_share=0.2 data.test_share=0.2"
)
FAST = (
    f" {TEXT} tracking=none infra.threads=1 infra.precision=fp32 trainer.sequence_tokens=64 trainer.sample_tokens=0"
    " trainer.warmup_tokens=500 trainer.log_every_tokens=500 trainer.evaluate_every_tokens=1_000"
)
KILLS = 3

pytestmark = pytest.mark.timeout(900)


@pytest.fixture(scope="module")
def place(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where commands are typed; no search goes on when the tests have ended."""
    directory = tmp_path_factory.mktemp("sweeps")
    (directory / "train.py").symlink_to(repository / "train.py")
    (directory / "text").mkdir()
    for number, text in enumerate(sorted(topics.values(), key=len, reverse=True)[:30]):
        (directory / "text" / f"{number:02}.txt").write_text(text[:1500])
    yield directory
    for sweep in all_sweeps(directory / "outputs"):
        jobs_command.main(["cancel", sweep.path.name, "--outputs", str(directory / "outputs")])


def run(command: str, directory: Path, code: int = 0) -> str:
    done = shell(command, directory)
    assert done.returncode == code, f"{command}\n{done.stdout[-3000:]}"
    return done.stdout


def until(true: Callable[[], bool], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.2)


def searched(output: str, directory: Path) -> SearchDirectory:
    found = re.search(r"^sweep (\w{8}): llmtrain jobs", output, re.MULTILINE)
    assert found is not None, output
    (place,) = [one for one in all_sweeps(directory / "outputs") if one.path.name == found[1]]
    return SearchDirectory(place)


def test_a_search_that_is_stopped_and_killed_ends_with_each_point_once(place: Path):
    search, listing, cancel, resume, wait, collect, rerun = commands("Searches")
    search += FAST + " trainer.budget_tokens=6_000"
    found = searched(run(search, place), place)
    assert found.path.name in run(listing, place)

    until(lambda: any(point.runs for point in found.place.begun().values()))
    run(cancel.replace("SWEEP", found.path.name), place)
    assert "stopped by a person" in run(wait.replace("SWEEP", found.path.name), place, code=3)

    run(resume.replace("SWEEP", found.path.name), place)
    draw, kills = random.Random(3), 0
    while kills < KILLS and found.searching:
        time.sleep(draw.uniform(0.1, 3))
        state = found.state()
        if state is not None and state.process is not None and found.searching:
            os.kill(state.process[0], signal.SIGKILL)
            kills += 1
            assert "its controller has gone: llmtrain jobs resume" in run(f"{listing} {found.path.name}", place)
            run(resume.replace("SWEEP", found.path.name), place)
    assert kills == KILLS
    assert "over: every point has been tried" in run(wait.replace("SWEEP", found.path.name), place)

    points = found.place.begun()
    assert [point.verdict for point in points.values()] == ["done"] * 4
    runs = [place / "outputs" / run for point in points.values() for run in point.runs]
    assert len(set(runs)) == 4
    assert len([path for path in (place / "outputs" / "smoke").iterdir() if path.is_dir()]) == 4
    finished = [json.loads(line)["event"] for line in (place / "outputs" / "journal.jsonl").read_text().splitlines()]
    assert finished.count("run.finished") == 4
    assert all(len(starts(run)) <= 2 for run in runs), "once, and once more after it was stopped"
    study = Study(found.study, found.read().space, found.read().sweep)
    assert [study.verdict(number)[0] for number in range(4)] == [TrialState.COMPLETE] * 4

    said = run(collect.replace("SWEEP", found.path.name), place)
    assert "no two points have several seeds, so their noise is unknown" in said
    assert "best: point" in said
    best = re.search(r"experiment: (\S+)/conf/experiment/best.yaml", said)
    assert best is not None
    again = run(f"python train.py experiment=best --config-dir {best[1]}/conf tracking=none", place)
    assert "is finished" in again

    said = run(rerun.replace("outputs/NAME/RUN_ID", str(runs[0].relative_to(place))), place)
    assert "hardware: " not in said
    assert "versions: " not in said
    assert re.search(r"^bit-equal: weights \w{12}, and \d+ rows of metrics$", said, re.MULTILINE)


@pytest.mark.campaign
def test_asha_stops_a_run_that_falls_behind(place: Path):
    command = (
        "python train.py -m experiment=smoke name=halving sweep=asha sweep.rung_tokens=2_000 sweep.reduction=2 "
        f"sweep.trials=2 sweep.concurrent=1 trainer.lr=1e-3,1e-6 trainer.budget_tokens=30_000 sweep.seed=3 {FAST}"
    )
    found = searched(run(command, place), place)
    said = run(f"llmtrain jobs wait {found.path.name}", place)
    assert "1 done, 1 pruned" in said
    rows = json.loads(run(f"llmtrain jobs {found.path.name} --json", place))
    by_lr = {row["overrides"][0]: row for row in rows}
    assert by_lr["trainer.lr=0.001"]["state"] == "finished"
    pruned = by_lr["trainer.lr=1e-06"]
    assert pruned["state"] == "pruned"
    assert pruned["tokens"] < pruned["total_tokens"] / 2
