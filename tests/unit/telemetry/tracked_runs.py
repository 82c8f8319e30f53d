"""Runs to track, and what becomes of processes that track them."""

import multiprocessing
from collections.abc import Callable
from pathlib import Path

from llmtrain.config.tracking import CometTracking, MLflowCometTracking, MLflowTracking, Tracking
from llmtrain.telemetry.tracking import Tracker, open_tracker

MLFLOW = MLflowTracking(kind="mlflow", uri=None)
COMET = CometTracking(kind="comet", project=None, workspace=None, api_key_env="COMET_KEY_OF_THE_TESTS")
BOTH = MLflowCometTracking(kind="mlflow_comet", mlflow=MLFLOW, comet=COMET)


def start(outputs: Path, config: Tracking = MLFLOW, run_id: str = "run1", **params) -> Tracker:
    run_directory = outputs / "demo" / run_id
    run_directory.mkdir(parents=True, exist_ok=True)
    return open_tracker(
        config,
        outputs=outputs,
        experiment="demo",
        run_id=run_id,
        run_directory=run_directory,
        params=params,
        tags={"purpose": "test"},
    )


def row(step: int, loss: float) -> dict:
    return {
        "step": step, "tokens": 10 * step, "time_utc": "2026-01-02T03:04:05+00:00", "seconds": 0.5, "train/loss": loss,
    }  # fmt: skip


def exit_code(work: Callable[[], None]) -> int | None:
    """Of a process of its own that does `work`."""
    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    process.join()
    return process.exitcode
