"""Other processes, on the run or on the tracking database, and clocks that jump: the run ends as if it were alone."""

import math
import re
from datetime import datetime
from pathlib import Path

import pytest

from llmtrain.telemetry.metrics import read
from tests.faults import faults, forkserver
from tests.faults.compare import assert_runs_equal, the_run
from tests.faults.disturbed import FIRST_ROW, SAVE, TRAIN, again, run, said
from tests.faults.faults import Before
from tests.faults.runs import PRETRAIN_NAME

LONG_S = 600


def locked(directory: Path, seconds: float = LONG_S) -> tuple[Path, Path, float]:
    return directory / "outputs" / "mlflow" / "mlflow.db", directory / "released", seconds


def test_a_database_that_is_locked_for_a_while_is_waited_for(fresh: Path, undisturbed: Path) -> None:
    code, output = run(fresh, Before(*FIRST_ROW, faults.lock, locked(fresh, seconds=1.5)))
    assert code == 0, output
    assert (fresh / "released").exists()
    assert_runs_equal(undisturbed, fresh, PRETRAIN_NAME)


def test_a_database_that_stays_locked_stops_no_training_and_the_next_run_sends_the_rows(
    fresh: Path, undisturbed: Path
) -> None:
    code, output = run(fresh, Before(*FIRST_ROW, faults.lock, locked(fresh)), function=faults.impatient_command)
    assert code == 75, output
    fact = f"{fresh}/outputs/mlflow/mlflow.db is locked by another process"
    assert f"MLflow fails ({fact}); training goes on and sends the rows later" in output
    assert f"\n{fact}\nWait for it, or stop it, and run the same command again; what is saved stays\n" in output
    assert (the_run(fresh, PRETRAIN_NAME) / "model" / "model.safetensors").exists()
    (fresh / "released").touch()
    again(fresh, undisturbed, continuing="continuing from step-00000008")


def test_a_new_run_does_not_start_without_its_database(fresh: Path, undisturbed: Path) -> None:
    faults.lock(*locked(fresh))
    code, output = run(fresh)
    assert code == 75, output
    assert "is locked by another process" in output
    assert "% " not in output, "no step was done"
    (fresh / "released").touch()
    again(fresh, undisturbed)


def test_of_two_processes_on_one_run_the_second_is_refused_and_the_first_is_not_disturbed(
    fresh: Path, undisturbed: Path
) -> None:
    go = fresh / "go"
    first = forkserver.start(faults.command, fresh, TRAIN, Before(SAVE, 2, faults.wait_for, (go,)))
    faults.wait_for(fresh / "go.waiting", announce=False)
    code = forkserver.finish(forkserver.start(faults.command, fresh, TRAIN))
    go.touch()
    assert forkserver.finish(first) == 0, said(fresh)
    output = said(fresh)
    assert code == 75, output
    assert f"{the_run(fresh, PRETRAIN_NAME).relative_to(fresh)}: another process works on this run; wait" in output
    assert_runs_equal(undisturbed, fresh, PRETRAIN_NAME)


DAY_S = 86_400


@pytest.mark.parametrize("seconds", [-DAY_S, DAY_S])
def test_clocks_that_jump_change_nothing_but_times(seconds: int, fresh: Path, undisturbed: Path) -> None:
    appending = "llmtrain.telemetry.metrics:MetricsFile.append"
    code, output = run(fresh, Before(appending, 2, faults.jump, (seconds,)), function=faults.command_with_clocks)
    assert code == 0, output
    assert_runs_equal(undisturbed, fresh, PRETRAIN_NAME)
    rows = read(the_run(fresh, PRETRAIN_NAME) / "metrics.jsonl")
    first, last = (datetime.fromisoformat(row["time_utc"]) for row in (rows[0], rows[-1]))
    assert abs((last - first).total_seconds() - seconds) < 3600, "the clock did jump"
    assert all(row["seconds"] >= 0 and math.isfinite(row["seconds"]) for row in rows)
    speeds = [row["train/tokens_per_second"] for row in rows if "train/tokens_per_second" in row]
    assert all(speed >= 0 and math.isfinite(speed) for speed in speeds)
    left = re.findall(r"tokens/s +(\S+) left", output)
    assert left
    assert all(re.fullmatch(r"\?|(\d+:)?\d+:\d\d", time) for time in left), left
