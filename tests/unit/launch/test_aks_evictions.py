"""Pods that are taken away come back, and their runs end as if nothing had happened. The pods are real processes."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from aks_runs import IMAGE
from kube_api import Api, serving
from kubelet import Kubelet, working

from llmtrain.artifacts import TrainedModel
from llmtrain.cli import jobs as jobs_command
from llmtrain.cli.train import main
from llmtrain.launch import aks
from llmtrain.launch.aks.job_sets import job_of
from llmtrain.launch.starts import starts
from llmtrain.launch.status import cancel, statuses
from llmtrain.launch.sweeps import SweepDirectory, all_sweeps
from llmtrain.telemetry import vitals
from llmtrain.telemetry.metrics import read, without_times
from tests.faults.runs import text

PATIENCE_S = 240
AKS = ("infra=aks_cpu", f"infra.launch.image={IMAGE}", "infra.launch.grace_seconds=60", "infra.launch.restarts=1")
SMALL = (
    "model=qwen3_tiny", "data=text_files", "data.corpus.paths=[text/*.txt]", "data.corpus.licence=PSF-2.0",
    "tracking=none", "trainer.sequence_tokens=64", "trainer.batch_rows=4", "trainer.warmup_tokens=1_000",
    "trainer.log_every_tokens=500", "trainer.evaluate_every_tokens=4_000", "trainer.checkpoint_every_tokens=3_000",
    "trainer.sample_tokens=2",
)  # fmt: skip
LONG, ENDLESS = "trainer.budget_tokens=7_680", "trainer.budget_tokens=20_000_000"
"""30 steps; hours."""
TWO_MACHINES = ("infra.ranks=2", "infra.launch.nodes=2")
JOB_SET = (*TWO_MACHINES, "infra.launch.job_set=true")


@pytest.fixture
def api(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Api]:
    monkeypatch.chdir(tmp_path)
    text(tmp_path, num_documents=20)
    aks._namespace.cache_clear()
    with serving(tmp_path) as (api, config):
        monkeypatch.setenv("KUBECONFIG", str(config))
        yield api


@pytest.fixture
def kubelet(api: Api, tmp_path: Path) -> Iterator[Kubelet]:
    with working(api, tmp_path / "outputs") as kubelet:
        yield kubelet


def submitted(*overrides: str) -> SweepDirectory:
    assert main([*AKS, *SMALL, *overrides]) == 0
    return all_sweeps(Path("outputs"))[-1]


def until(true: Callable[[], object], what: str) -> None:
    end = time.monotonic() + PATIENCE_S
    while not true():
        assert time.monotonic() < end, f"{what} has not come"
        time.sleep(0.05)


def steps(run: Path) -> int:
    path = run / vitals.VITALS_FILE
    return len(vitals.read(path)) if path.exists() else 0


def ended(place: SweepDirectory) -> str:
    """How its only run has ended."""
    jobs_command.main(["wait", place.path.name])
    [status] = statuses(place)
    return status.state


def mathematics(run: Path) -> tuple[str, list[dict]]:
    return TrainedModel.read(run / "trained.json").weights_sha256, [
        without_times(row) for row in read(run / "metrics.jsonl")
    ]


@pytest.mark.parametrize(
    "machines",
    [
        pytest.param((), id="one machine", marks=pytest.mark.campaign),
        pytest.param(TWO_MACHINES, id="two machines"),
        pytest.param(JOB_SET, id="two machines of a JobSet", marks=pytest.mark.campaign),
    ],
)
def test_an_evicted_pod_comes_back_and_the_run_ends_as_if_nothing_had_been(
    api: Api, kubelet: Kubelet, machines: tuple[str, ...], capfd: pytest.CaptureFixture[str]
):
    count = 2 if machines else 1
    place = submitted(LONG, *machines)
    [status] = statuses(place)
    until(lambda: steps(status.directory) >= 5, "the fifth step")
    job = job_of(status.handle) if machines == JOB_SET else status.handle
    [first, *_] = kubelet.pods(job)
    kubelet.evict(first)
    assert ended(place) == "finished"
    begun = starts(status.directory)
    assert len(begun) == 2
    assert begun[1].step >= 5, "the step that it had reached was saved"
    assert kubelet.codes[job] == [75] * count + [0] * count
    if machines == JOB_SET:
        seen = api.get("jobsets", status.handle)["status"]
        assert (seen["restarts"], seen["restartsCountTowardsMax"]) == (1, 0), "an eviction does not count"
    else:
        assert kubelet.failed.get(job, 0) == count - 1, "who was evicted does not count"

    before = mathematics(status.directory)
    rerun = status.directory.rename(status.directory.with_name("evicted"))
    for kind in ("jobsets", "jobs"):
        for item in api.all(kind):
            api.remove(kind, item["metadata"]["name"])
    kubelet.done.clear()
    aks._namespace.cache_clear()
    again = submitted(LONG, *machines)
    assert ended(again) == "finished"
    assert len(starts(status.directory)) == 1
    assert mathematics(status.directory) == before == mathematics(rerun)
    assert capfd.readouterr().err.count("Traceback") == 0


def test_a_run_that_is_cancelled_saves_and_stops_for_good(api: Api, kubelet: Kubelet):
    place = submitted(ENDLESS)
    [status] = statuses(place)
    until(lambda: steps(status.directory) >= 3, "the third step")
    cancel(place, statuses(place))
    assert ended(place) == "stopped"
    assert kubelet.codes[status.handle] == [75]
    assert len(list((status.directory / "checkpoints").glob("step-*"))) >= 1


def test_a_mistake_fails_at_once_and_another_start_is_not_tried(api: Api, kubelet: Kubelet, tmp_path: Path):
    place = submitted(LONG, "infra.launch.queue=gpus")
    [status] = statuses(place)
    assert status.state == "waiting"
    (status.directory / "config.json").write_text("{}")
    api.merge("jobs", status.handle, {"spec": {"suspend": False}})  # Kueue admits it
    until(lambda: kubelet.codes.get(status.handle), "the end of the first pod")
    time.sleep(1)
    assert kubelet.codes[status.handle] == [2]
    assert api.get("jobs", status.handle)["status"]["conditions"][0]["reason"] == "PodFailurePolicy"
    assert "is not a frozen config" in (status.directory / "log.txt").read_text()


def test_a_share_that_is_not_mounted_says_so(api: Api, kubelet: Kubelet, tmp_path: Path, capfd):
    kubelet.outputs = tmp_path / "another share"
    place = submitted(LONG)
    assert ended(place) == "failed"
    [status] = statuses(place)
    assert status.job.reason == "PodFailurePolicy, exit code 2"
    assert "is this machine's outputs directory that of the one that submits?" in capfd.readouterr().err
