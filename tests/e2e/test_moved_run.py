"""A run that is killed and renamed goes on, and MLflow and Comet end with the same numbers: those of metrics.jsonl."""

import json
import multiprocessing
import os
import signal
import sqlite3
import sys
from pathlib import Path
from pydoc_data.topics import topics
from zipfile import ZipFile

from llmtrain.artifacts import TrainedModel
from llmtrain.cli.models import main as models
from llmtrain.cli.train import main
from llmtrain.registry.registry import Registry
from llmtrain.telemetry.database import database_path
from llmtrain.telemetry.metrics import METRICS_FILE, MetricsFile, read

RUN = (
    "model=qwen3_tiny",
    "data=text_files",
    "data.corpus.paths=[text/*.txt]",
    "data.corpus.licence=PSF-2.0",
    "infra.precision=fp32",
    "infra.threads=1",
    "trainer.budget_tokens=3_072",  # 12 steps
    "trainer.sequence_tokens=64",
    "trainer.batch_rows=4",
    "trainer.warmup_tokens=300",
    "trainer.log_every_tokens=512",
    "trainer.evaluate_every_tokens=1_024",
    "trainer.checkpoint_every_tokens=1_024",
    "tracking=mlflow_comet",
    "tracking.comet.api_key_env=COMET_KEY_OF_THE_TESTS",
    "name=moved",
)


def train(directory: Path, outputs_dir: str, kill_at_row: int | None = None) -> tuple[int | None, str]:
    """Exit code and output of a training process in `directory`; SIGKILL comes after the row is written."""

    def work() -> None:
        os.chdir(directory)
        with Path("output.txt").open("w", buffering=1) as output:
            os.dup2(output.fileno(), 1)
            os.dup2(output.fileno(), 2)
            sys.stdout = sys.stderr = output
            append, rows = MetricsFile.append, []

            def append_and_die(self: MetricsFile, row: dict) -> None:
                append(self, row)
                rows.append(row)
                if len(rows) == kill_at_row:
                    os.kill(os.getpid(), signal.SIGKILL)

            MetricsFile.append = append_and_die
            code = main([*RUN, f"outputs_dir={outputs_dir}"])
        os._exit(code)

    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    process.join()
    return process.exitcode, (directory / "output.txt").read_text()


Points = list[tuple[str, int, float]]


def in_metrics_file(run: Path) -> Points:
    """(metric, step, value) as training wrote them; the last figures have the step after the last."""
    rows = read(run / METRICS_FILE)
    rows.append({**TrainedModel.read(run / "trained.json").metrics, "step": rows[-1]["step"] + 1})
    return sorted(
        (key, row["step"], value)
        for row in rows
        for key, value in row.items()
        if key not in ("step", "seconds", "time_utc")
    )


def in_mlflow(outputs: Path) -> tuple[Points, dict[str, str]]:
    """Every point and param in the database."""
    with sqlite3.connect(database_path(outputs)) as connection:
        points = connection.execute("SELECT key, step, value FROM metrics").fetchall()
        params = dict(connection.execute("SELECT key, value FROM params").fetchall())
    connection.close()
    return sorted(points), params


def in_comet(run: Path) -> tuple[Points, dict[str, str]]:
    """Every point and param in the archives."""
    points, params = [], {}
    for path in (run / "comet").iterdir():
        for line in ZipFile(path).read("messages.json").splitlines():
            message = json.loads(line)
            if message["type"] == "metric_msg":
                metric = message["payload"]["metric"]
                points.append((metric["metricName"], metric["step"], metric["metricValue"]))
            elif message["type"] == "parameter_msg" and message["payload"]["param"]["source"] == "manual":
                params[message["payload"]["param"]["paramName"]] = message["payload"]["param"]["paramValue"]
    return sorted(points), params


def test_a_killed_run_goes_on_after_a_rename_and_both_trackers_have_its_numbers(tmp_path, capsys):
    import llmtrain.training.run  # noqa: F401  once, for all processes that are forked below

    (tmp_path / "text").mkdir()
    for number, topic in enumerate(sorted(topics.values(), key=len)[-30:]):
        (tmp_path / "text" / f"{number:02}.txt").write_text(topic[:1500])
    code, output = train(tmp_path, "outputs", kill_at_row=3)  # the second row was followed by a checkpoint
    assert code == -signal.SIGKILL, output
    (key_file,) = tmp_path.glob("outputs/moved/*/comet_experiment_key")
    experiment_key = key_file.read_text()

    (tmp_path / "moved").mkdir()
    outputs = (tmp_path / "outputs").rename(tmp_path / "moved" / "here")
    code, output = train(tmp_path, "moved/../moved/here")
    assert code == 0, output
    assert "continuing from step-00000004" in output
    (run,) = (path for path in (outputs / "moved").iterdir() if path.is_dir())
    written = in_metrics_file(run)
    assert {step for _, step, _ in written} == {2, 4, 6, 8, 10, 12, 13}
    points, params = in_mlflow(outputs)
    comet_points, comet_params = in_comet(run)
    assert points == comet_points
    assert len(points) == len(written)
    # the killed process measured another speed in the row that was trained again
    assert {point[:2] for point in set(points) ^ set(written)} == {("train/tokens_per_second", 6)}
    # MLflow took the params from the process that was killed, before the rename
    assert params | {"outputs_dir": "moved/../moved/here"} == comet_params
    assert params["outputs_dir"] == "outputs"
    assert params["trainer.budget_tokens"] == "3072"
    assert (run / "comet_experiment_key").read_text() == experiment_key

    for path in outputs.rglob("*"):
        assert path.is_dir() or os.fsencode(tmp_path) not in path.read_bytes(), f"{path} holds an absolute path"
    outputs = outputs.rename(tmp_path / "at last")
    (run,) = (path for path in (outputs / "moved").iterdir() if path.is_dir())
    code, output = train(tmp_path, f"'{outputs}'")
    assert code == 0, output
    assert f"{run} is finished: moved@1.0.0" in output
    (version,) = Registry(outputs).versions()
    Registry(outputs).verify(version)
    assert models(["--outputs", str(outputs)]) == 0
    assert capsys.readouterr().out.startswith("moved@1.0.0  pretrain")
    for path in (tmp_path / "outputs", tmp_path / "moved" / "here"):
        assert not path.exists(), "nothing is made again where outputs were"
