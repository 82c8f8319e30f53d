"""From a checked search to a controller of its own."""

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from llmtrain.config.axes import Space
from llmtrain.config.root import TrainConfig
from llmtrain.errors import RunFailed, TryAgain, UserError
from llmtrain.launch.engine import engine_of
from llmtrain.launch.search import SearchDirectory, Searched, in_words
from llmtrain.launch.submit import Say, check_policies, checked_runs, elsewhere, one_launch
from llmtrain.launch.sweeps import SweepDirectory, sweep_of
from llmtrain.processes import importable


def submit_search(
    space: Space,
    points: Sequence[tuple[list[str], TrainConfig]],
    *,
    config_dirs: Sequence[Path] = (),
    config_name: str = "train",
    force: bool = False,
    dry_run: bool = False,
    say: Say = print,
) -> SweepDirectory:
    """Leave the search of `space` to a process of its own, and return; the same call again goes on with it.

    `points` are some of its points, with every option and end: their data are prepared here. With other limits
    (`sweep.trials`, `sweep.concurrent`, the budgets) it is the same search. Raises the errors of `llmtrain.errors`.
    """
    launch, config = one_launch([config for _, config in points]), points[0][1]
    outputs, engine = Path(config.outputs_dir), engine_of(launch)
    check_policies(config.environment, force=force)
    searched = Searched(
        space=space,
        config=config,
        config_dirs=tuple(str(directory.resolve()) for directory in config_dirs),
        config_name=config_name,
        force=force,
        directory=os.getcwd(),
    )
    _check_budget(searched)
    sweep_id = searched.sweep_id
    runs = checked_runs(points, say=say)
    place = SearchDirectory(SweepDirectory(outputs, sweep_id))
    if dry_run:
        say(engine.script(place.path, runs[:1]))
        return place.place
    with place.place.alone():
        place.place.write(sweep_of(launch.kind, [], sweep_id=sweep_id))
        place.write(searched)
        start_controller(place)
    say(in_words(place))
    say(f"sweep {sweep_id}: llmtrain jobs {sweep_id}" + elsewhere(outputs))
    return place.place


def _check_budget(searched: Searched) -> None:
    """Raises UserError where the environment allows a submission fewer hours of devices than the search may take."""
    environment, budget = searched.config.environment, searched.sweep.budget_device_hours
    if environment.device_hours is not None and (budget is None or budget > environment.device_hours):
        raise UserError(
            f"environment={environment.name} allows {environment.device_hours:g} hours of devices; "
            f"set sweep.budget_device_hours={environment.device_hours:g} or less"
        )


def start_controller(place: SearchDirectory) -> None:
    """Have a detached process go on with the search; nothing happens where one does. Raises TryAgain where the one
    before still waits for its runs to save, RunFailed where it does not come up."""
    if place.searching:
        if place.stop.exists():
            raise TryAgain(f"{place.path}: its runs are being stopped; resume it when they have ended")
        return
    place.stop.unlink(missing_ok=True)
    log = place.path / "controller.log"
    with importable(), log.open("ab") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "llmtrain.launch.controller", str(place.path.resolve())],
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=file,
            start_new_session=True,
        )
    while (state := place.state()) is None or state.process is None or state.process[0] != process.pid:
        if process.poll() is not None:
            if state is not None and state.process is None and process.returncode == 0:
                return  # there was nothing left to do
            raise RunFailed(f"the controller ended with {process.returncode}; {log} says why")
        time.sleep(0.05)
