"""What Slurm is asked for, and how its answers are read; the real one is in tests/e2e/test_slurm.py."""

from pathlib import Path

import pytest

from llmtrain.config.compose import load_config
from llmtrain.config.frozen import FrozenRun, Resolved
from llmtrain.errors import ConfigError, UserError
from llmtrain.launch import slurm
from llmtrain.launch.engine import Job, Run, State

RESOLVED = Resolved(
    tokenizer_path="t", tokenizer_sha256="0", text_path="d", text_sha256="0", pairs_path=None, pairs_sha256=None,
    parent_version=None, parent_path=None, parent_weights_sha256=None,
)  # fmt: skip


def run(*overrides: str) -> Run:
    frozen = FrozenRun(config=load_config(list(overrides)), resolved=RESOLVED, attempt=1)
    return Run(Path("outputs/a/b"), frozen)


def script(tmp_path: Path, *overrides: str, number: int = 1) -> list[str]:
    one = run(*overrides)
    return slurm.SlurmEngine(one.infra.launch).script(tmp_path / "0123abcd", [one] * number).splitlines()


def test_a_run_asks_for_what_its_config_says(tmp_path: Path):
    lines = script(
        tmp_path, "infra=slurm", "infra.ranks=8", "infra.launch.nodes=2", "infra.launch.partition=gpu",
        "infra.launch.account=team", "infra.launch.gpu_type=h100", "infra.launch.memory_gib_per_node=500",
        "infra.launch.minutes=90", "infra.launch.grace_seconds=300",
        "infra.launch.options=['constraint=ib',exclusive]", "infra.launch.setup=[module load cuda]",
    )  # fmt: skip
    asked = dict(line.removeprefix("#SBATCH --").partition("=")[::2] for line in lines if line.startswith("#SBATCH"))
    folder = str(tmp_path / "0123abcd" / "slurm")
    assert asked == {
        "job-name": "llmtrain-0123abcd", "partition": "gpu", "account": "team", "nodes": "2", "ntasks-per-node": "4",
        "cpus-per-task": "8", "gres": "gpu:h100:4", "mem": "500G", "time": "90", "signal": "USR2@300", "requeue": "",
        "constraint": "ib", "exclusive": "", "open-mode": "append", "wckey": "submitit",
        "output": f"{folder}/%j_0_log.out",
    }  # fmt: skip
    assert "module load cuda" in lines


def test_a_sweep_is_an_array_of_which_so_many_run_at_once(tmp_path: Path):
    assert "#SBATCH --array=0-2%3" in script(tmp_path, "infra=slurm_cpu", number=3)
    assert "#SBATCH --array=0-2%2" in script(tmp_path, "infra=slurm_cpu", "infra.launch.parallel=2", number=3)
    large = [line for line in script(tmp_path, "infra=slurm_cpu", number=2500) if "--array" in line]
    assert large == ["#SBATCH --array=0-999%1000", "#SBATCH --array=0-999%1000", "#SBATCH --array=0-499%500"]
    shared = [
        line
        for line in script(tmp_path, "infra=slurm_cpu", "infra.launch.parallel=6", number=2500)
        if "--array" in line
    ]
    assert shared == ["#SBATCH --array=0-999%2", "#SBATCH --array=0-999%2", "#SBATCH --array=0-499%2"]


def test_no_gpus_are_asked_for_where_there_are_none(tmp_path: Path):
    assert not [line for line in script(tmp_path, "infra=slurm_cpu") if "gres" in line]


def test_a_machine_without_slurm_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    one = run("infra=slurm_cpu")
    with pytest.raises(UserError, match="there is no sbatch here: submit on a login node"):
        list(slurm.SlurmEngine(one.infra.launch).submit(tmp_path, [one]))


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("7_1|PENDING||Resources", Job(State.WAITING, "", "pending, Resources")),
        ("7_1|RUNNING|node3|None", Job(State.RUNNING, "node3", "running")),
        ("7_1|COMPLETING|node3|None", Job(State.STOPPING, "node3", "completing")),
        ("7_1|CANCELLED by 0|node3|0:15", Job(State.ENDED, "node3", "cancelled, 0:15")),
        ("7_1|COMPLETED|node3|0:0", Job(State.ENDED, "node3", "completed")),
        ("7_1|OUT_OF_MEMORY|None assigned|0:125", Job(State.ENDED, "", "out_of_memory, 0:125")),
    ],
)
def test_slurms_words_for_a_job(line: str, expected: Job):
    assert slurm._table(["echo", line]) == {"7_1": expected}


def test_ranks_must_fit_the_nodes_and_precision_must_be_said():
    with pytest.raises(ConfigError, match=r"infra.ranks=3 cannot be shared out evenly .* set infra.ranks=4"):
        load_config(["infra=slurm", "infra.ranks=3", "infra.launch.nodes=2"])
    with pytest.raises(ConfigError, match=r"set infra\.precision=bf16 or fp32"):
        load_config(["infra=slurm_cpu", "infra.precision=bf16_if_fast"])
    assert load_config(["infra=local_cpu"]).infra.precision == "bf16_if_fast"
