"""The scripts in bench/ run, and the peers in them compute the same losses; speed is not judged here."""

import json
import sys
from pathlib import Path

import pytest

from tests.e2e.conftest import shell

pytestmark = pytest.mark.campaign


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("command", "cases"),
    [
        ("dpo.py --quick --threads 1", {"dpo tiny-short"}),
        ("pretrain.py --quick --threads 1", {"pretrain tiny"}),
        ("sft.py --quick --threads 1", {"sft tiny"}),
    ],
)
def test_peers_take_turns_and_agree_on_every_loss(repository: Path, tmp_path: Path, command: str, cases: set[str]):
    done = shell(f"{sys.executable} {repository}/bench/{command} --json {tmp_path}/found.json", repository)
    assert done.returncode == 0, done.stdout[-3000:]
    found = json.loads((tmp_path / "found.json").read_bytes())
    assert found.keys() == cases
    for case in found.values():
        assert case["loss_difference"] <= 1e-4
        assert case["ours"]["imported_gb"] < case["ours"]["peak_gb"]
        assert case["speed"] > 0


@pytest.mark.timeout(600)
def test_a_held_out_point_learns_from_the_calibration_runs(repository: Path, tmp_path: Path):
    for _ in range(2):  # the calibration run is not repeated, the point is
        done = shell(f"{sys.executable} {repository}/bench/plan_accuracy.py {tmp_path} --quick", repository)
        assert done.returncode == 0, done.stdout[-3000:]
        (record,) = tmp_path.glob("held-out-11/held-out-11/*/plan_vs_actual.json")
        assert json.loads(record.read_bytes())["prediction"]["calibrated_from"] == 1
    assert "small, 8 x 256" not in done.stdout
    assert "of 1: peak memory within 5 %" in done.stdout
    done = shell(f"{sys.executable} {repository}/bench/plan_accuracy.py {tmp_path} 99", repository)
    assert (done.returncode, "no held-out point 99" in done.stdout) == (2, True)


@pytest.mark.timeout(300)
def test_the_scripts_without_a_peer_run(repository: Path, tmp_path: Path):
    for command in (
        "scaling.py --quick --threads 1",
        "cuda.py --kinds pretrain sft --dry-run --rounds 1 --steps 1",
        "head.py --quick",
    ):
        done = shell(f"{sys.executable} {repository}/bench/{command} --json {tmp_path}/found.json", repository)
        assert done.returncode == 0, done.stdout[-3000:]
    found = json.loads((tmp_path / "found.json").read_bytes())
    assert found.keys() == {"scaling", "cuda pretrain", "cuda sft", "head cpu"}
    assert found["head cpu"]["kernels"].keys() == {"logits", "torch"}
    context, twice = found["scaling"]["context"]
    assert twice["context"] == 2 * context["context"]
    assert context["mflop_per_token"] < twice["mflop_per_token"]
    assert found["cuda sft"]["tokens_per_second"] > 0


@pytest.mark.timeout(600)
def test_a_simulated_cluster_runs_every_point_of_a_search(repository: Path, tmp_path: Path):
    command = f"{sys.executable} {repository}/bench/launch_scale.py --points 40 --grid 2 --json {tmp_path}/found.json"
    done = shell(command, repository)
    assert done.returncode == 0, done.stdout[-3000:]
    found = json.loads((tmp_path / "found.json").read_bytes())
    assert found["points"] == 40
    assert 0 < found["stopped early"] < 40
    assert found["days on the cluster"] > 30 / 1440
