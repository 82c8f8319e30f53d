"""Frozen configs of every schema that ever was are read, and name the run that they always named."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from llmtrain.config.compose import load_config
from llmtrain.config.frozen import SCHEMA_VERSION, thaw
from llmtrain.errors import UserError

FROZEN = Path(__file__).parents[2] / "golden" / "frozen"
RUN_IDS = {f"v{version}-{kind}": run_id for version in (1, 2, 3, 4)
           for kind, run_id in (("pretrain", "451c1ee774cb"), ("dpo", "a981d8941556"))}  # fmt: skip
"""The directories that these runs had when they were made."""
CONFIG_BEFORE = {
    "adapter.kind": "none",
    "infra.hardware.kind": "measured",
    "infra.hardware.assumed_mfu": None,
    "infra.hardware.watts": None,
    "infra.hardware.price_per_hour": None,
    "infra.ranks": 1,
    "infra.strategy": "ddp",
    "infra.offload": False,
    "infra.attention": "auto",
    "infra.compile": False,
    "infra.activation_checkpointing": "none",
    "trainer.schedule": "cosine",
    "trainer.decay_share": 0.2,
    "trainer.optimizer": "adamw",
    "trainer.muon_momentum": 0.95,
}
RESOLVED_BEFORE = ("chats_path", "chats_sha256", "parent_shape_sha256", "teacher_path", "teacher_weights_sha256")
BEFORE = {f"config.{name}": value for name, value in CONFIG_BEFORE.items()}
BEFORE |= {f"resolved.{name}": None for name in RESOLVED_BEFORE}
"""What was done before schema 3 could say otherwise."""
BEFORE_DPO = {f"config.trainer.{name}": value for name, value in {
    "loss": "sigmoid", "label_smoothing": 0.0, "sft_weight": 0.0, "target_margin": 0.5, "desirable_weight": 1.0,
    "undesirable_weight": 1.0}.items()}  # fmt: skip


BEFORE_4 = {f"config.{name}": value for name, value in {
    "infra.launch.kind": "local", "infra.launch.parallel": 1, "infra.launch.restarts": 3, "environment.name": "dev",
    "environment.outputs_dir": "outputs", "environment.tracking_uri": None, "environment.committed_code": False,
    "environment.force": True, "environment.device_hours": None, "sweep.kind": "grid",
    "sweep.metric": "validation/loss", "sweep.direction": "min", "sweep.budget_device_hours": None,
    "sweep.budget_usd": None}.items()}  # fmt: skip
"""What was done before schema 4 could say otherwise."""


@pytest.mark.parametrize(("name", "run_id"), RUN_IDS.items())
def test_a_frozen_config_of_an_older_schema_keeps_its_run_id_and_does_what_it_did(name: str, run_id: str):
    frozen = thaw(FROZEN / f"{name}.json")
    assert frozen.run_id == run_id
    assert frozen.config.schema_version == SCHEMA_VERSION
    written = json.loads((FROZEN / f"{name}.json").read_text())
    now = frozen.model_dump(mode="json")
    expected = {"config.infra.loss_kernel": "torch"}  # schema 5 could say otherwise
    if written["config"]["schema_version"] < 4:
        expected |= BEFORE_4
    if written["config"]["schema_version"] < 3:
        expected |= BEFORE | (BEFORE_DPO if name.endswith("dpo") else {"config.trainer.packing": "stream"})
    if written["config"]["schema_version"] < 2:
        expected["config.trainer.sample_tokens"] = 0
    assert {path: value for path, value in leaves(now) if path not in dict(leaves(written))} == expected
    assert written["config"]["infra"].pop("kind", "local") == "local", "there was one kind"
    del now["config"]["schema_version"], written["config"]["schema_version"]
    assert dict(leaves(written)).items() <= dict(leaves(now)).items(), "nothing else is different"


def leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every value in nested dictionaries by its dotted path."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from leaves(inner, f"{path}.{key}" if path else key)
    else:
        yield path, value


def test_every_kept_file_is_tested_and_every_older_version_is_kept():
    assert {path.stem for path in FROZEN.glob("*.json")} == set(RUN_IDS)
    versions = {json.loads(path.read_text())["config"]["schema_version"] for path in FROZEN.glob("*.json")}
    assert versions == set(range(1, SCHEMA_VERSION))


def test_what_conf_composes_is_of_the_schema_that_is_read_last():
    assert load_config([]).schema_version == SCHEMA_VERSION


def test_a_frozen_config_of_a_newer_llmtrain_is_refused(tmp_path: Path):
    newer = json.loads((FROZEN / "v1-dpo.json").read_text())
    newer["config"] |= {"schema_version": SCHEMA_VERSION + 1, "something": "new"}
    (tmp_path / "config.json").write_text(json.dumps(newer))
    with pytest.raises(
        UserError, match=rf"newer llmtrain: its schema_version is {SCHEMA_VERSION + 1}.*update llmtrain"
    ):
        thaw(tmp_path / "config.json")


CONFIGS = ("1", '{"schema_version": 1}', '{"schema_version": 0}')


@pytest.mark.parametrize("content", ["", "[]", "{}", *(f'{{"config": {config}}}' for config in CONFIGS)])
def test_what_is_no_frozen_config_is_refused(tmp_path: Path, content: str):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(UserError, match="is not a frozen config of this version"):
        thaw(tmp_path / "config.json")


def test_samples_that_leave_no_room_for_a_prompt_are_refused():
    with pytest.raises(UserError, match=r"trainer.sample_tokens=1024 leaves no room for a prompt"):
        load_config(["trainer.sample_tokens=1024"])
    load_config(["trainer.sample_tokens=1023"])
