"""Frozen configs of every schema that ever was are read, and name the run that they always named."""

import json
from pathlib import Path

import pytest

from llmtrain.config.compose import load_config
from llmtrain.config.frozen import SCHEMA_VERSION, thaw
from llmtrain.errors import UserError

FROZEN = Path(__file__).parents[2] / "golden" / "frozen"
RUN_IDS = {"v1-pretrain": "451c1ee774cb", "v1-dpo": "a981d8941556"}
"""The directories that these runs had when they were made."""


@pytest.mark.parametrize(("name", "run_id"), RUN_IDS.items())
def test_a_frozen_config_of_an_older_schema_keeps_its_run_id_and_does_what_it_did(name: str, run_id: str):
    frozen = thaw(FROZEN / f"{name}.json")
    assert frozen.run_id == run_id
    assert frozen.config.schema_version == SCHEMA_VERSION
    assert frozen.config.trainer.sample_tokens == 0
    written = json.loads((FROZEN / f"{name}.json").read_text())
    now = frozen.model_dump(mode="json")
    del now["config"]["trainer"]["sample_tokens"]
    now["config"]["schema_version"] = written["config"]["schema_version"]
    assert now == written, "nothing else is different"


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
