"""What an environment lets be submitted."""

import re
from pathlib import Path

import pytest

from llmtrain.artifacts import DatasetManifest, SplitCounts
from llmtrain.config.compose import load_config
from llmtrain.config.frozen import FrozenRun, Resolved
from llmtrain.errors import ConfigError, UserError
from llmtrain.launch.engine import Run
from llmtrain.launch.submit import check_plans, check_policies, submit
from llmtrain.training import machine
from llmtrain.training import run as training_run

ADDRESSES = ["environment.outputs_dir=here", "environment.tracking_uri=http://127.0.0.1:5000"]
RESOLVED = Resolved(
    tokenizer_path="t", tokenizer_sha256="0", text_path="text", text_sha256="text", pairs_path=None, pairs_sha256=None,
    parent_version=None, parent_path=None, parent_weights_sha256=None,
)  # fmt: skip
OF_TUNING = {
    "dpo": {"pairs_path": "preferences", "pairs_sha256": "preferences"},
    "sft": {"chats_path": "chats", "chats_sha256": "chats"},
}
DAY = ("infra=h100_x8", "trainer.budget_tokens=1_000_000_000_000")


def run(directory: Path, *overrides: str, trainer: str = "pretrain", documents: int = 10**11) -> Run:
    """A run whose data have that many documents of 100 tokens."""
    config = load_config(["model=qwen3_tiny", f"outputs_dir={directory}", f"trainer={trainer}", *overrides])
    resolved = RESOLVED.model_copy(update=OF_TUNING.get(trainer, {}))
    counts = SplitCounts(num_documents=documents, num_tokens=100 * documents, num_bytes=400 * documents)
    for kind in ("text", "preferences", "chats"):
        (directory / kind).mkdir(exist_ok=True)
        manifest = DatasetManifest(
            parents=(), kind=kind, path=kind, content_sha256=kind, tokenizer_sha256="0", splits={"train": counts},
            sources={}, num_duplicates=0, num_refused=0, files={},
        )  # fmt: skip
        manifest.write(directory / kind / "manifest.json")
    return Run(directory / "a" / "b", FrozenRun(config=config, resolved=resolved, attempt=1))


def test_an_environment_carries_the_addresses():
    config = load_config(["environment=prod", *ADDRESSES])
    assert config.outputs_dir == "here"
    assert config.tracking.uri == "http://127.0.0.1:5000"
    assert load_config([]).outputs_dir == "outputs"
    assert load_config(["environment=prod", *ADDRESSES, "outputs_dir=there"]).outputs_dir == "there"


def test_force_passes_only_where_it_may():
    check_policies(load_config([]).environment, force=True)
    staging = load_config(["environment=staging", *ADDRESSES]).environment
    check_policies(staging, force=False)
    with pytest.raises(UserError, match=r"environment=staging does not let --force pass"):
        check_policies(staging, force=True)


def test_prod_takes_committed_code_only(monkeypatch: pytest.MonkeyPatch):
    prod = load_config(["environment=prod", *ADDRESSES]).environment
    for commit, refused in (("0123456789ab", False), (None, False), ("0123456789ab" + machine.CHANGES, True)):
        monkeypatch.setattr(machine, "commit", lambda commit=commit: commit)
        check_policies(load_config([]).environment, force=False)
        if refused:
            with pytest.raises(UserError, match="environment=prod submits committed code only"):
                check_policies(prod, force=False)
        else:
            check_policies(prod, force=False)


def test_limits_are_held_against_the_plans_of_all_ranks(tmp_path: Path):
    def needed(key: str, *overrides: str, number: int = 1) -> float:
        one = run(tmp_path, f"{key}=1e-9", *DAY, *overrides)
        with pytest.raises(UserError, match=rf"by their plans, and .* 1e-09; .* or raise {key}$") as why:
            check_plans([one] * number)
        return float(re.findall(r"(?:take|cost) ([0-9.]+)", str(why.value))[0])

    hours = needed("environment.device_hours")
    assert hours > 8
    assert needed("environment.device_hours", number=3) == pytest.approx(3 * hours, rel=0.01)
    assert needed("sweep.budget_device_hours") == hours
    assert needed("sweep.budget_usd") == pytest.approx(hours * 12.29, rel=0.01)
    enough = run(tmp_path, "infra=h100_x8", "environment.device_hours=1e9", "sweep.budget_usd=1e9")
    check_plans([enough])
    check_plans([])


@pytest.mark.parametrize("trainer", ["dpo", "sft"])
def test_how_long_tuning_takes_is_in_the_prepared_data(tmp_path: Path, trainer: str):
    def hours(documents: int) -> float:
        one = run(tmp_path, "infra=h100_x8", "sweep.budget_device_hours=1e-9", trainer=trainer, documents=documents)
        with pytest.raises(UserError, match=r"take [0-9.]+ hours .* or raise sweep.budget_device_hours$") as why:
            check_plans([one])
        return float(re.findall(r"take ([0-9.]+)", str(why.value))[0])

    assert hours(2 * 10**11) == pytest.approx(2 * hours(10**11), rel=0.01)


def test_hours_of_machines_that_nobody_has_described_are_not_known(tmp_path: Path):
    check_plans([run(tmp_path, "infra=slurm")])
    for key in ("environment.device_hours", "sweep.budget_device_hours"):
        with pytest.raises(UserError, match=rf"\({key}\).* knows nothing of the machines of infra\.launch\.kind=slurm"):
            check_plans([run(tmp_path, "infra=slurm", f"{key}=10")])
    with pytest.raises(ConfigError, match="needs a price"):
        load_config(["infra=slurm", "sweep.budget_usd=10"])


def test_a_missing_base_is_not_trained_where_runs_are_submitted(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(training_run, "frozen_run", lambda config, train_base, **how: train_base())
    config = load_config(["trainer=dpo", "infra=slurm_cpu"])
    with pytest.raises(UserError, match=r"submit its pretraining first \(the same command with trainer=pretrain\)"):
        submit([(["trainer=dpo"], config)], dry_run=True)
    with pytest.raises(UserError, match=r"^point 1 of 2, trainer\.seed=1: trainer\.init_from=latest finds no model"):
        submit([(["trainer.seed=1"], config), (["trainer.seed=2"], config)], dry_run=True)
