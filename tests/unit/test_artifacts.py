"""Records are frozen, their identity is their content; weights are named by a hash that any change changes."""

import hashlib
import json

import numpy as np
import pytest
from pydantic import ValidationError
from safetensors.numpy import save_file

from llmtrain.artifacts import Evidence, ModelVersion, TrainedModel, weights_sha256
from llmtrain.errors import IntegrityError

EVIDENCE = Evidence(parents=("ab",), procedure="llmtrain.evaluation.loss", figures={"loss_nats": 1.5})


def test_a_records_identity_is_the_hash_of_its_canonical_json():
    text = '{"figures":{"loss_nats":1.5},"parents":["ab"],"procedure":"llmtrain.evaluation.loss"}'
    assert EVIDENCE.sha256 == hashlib.sha256(text.encode()).hexdigest()


def test_a_record_is_read_as_it_was_written(tmp_path):
    EVIDENCE.write(tmp_path / "evidence.json")
    assert Evidence.read(tmp_path / "evidence.json") == EVIDENCE


def test_a_record_cannot_be_changed():
    with pytest.raises(ValidationError, match="frozen"):
        EVIDENCE.procedure = "another"


@pytest.mark.parametrize("text", ["", "{}", '{"parents": [], "procedure": "p", "figures": {}, "more": 1}', "[1]"])
def test_a_file_that_is_no_such_record_is_named(tmp_path, text):
    (tmp_path / "evidence.json").write_text(text)
    with pytest.raises(IntegrityError, match=r"evidence\.json is not a Evidence"):
        Evidence.read(tmp_path / "evidence.json")


def test_the_schemas_are_exported_with_a_meaning_for_each_field():
    for record in (TrainedModel, ModelVersion):
        schema = json.loads(json.dumps(record.model_json_schema()))
        assert schema["additionalProperties"] is False
        assert "parents" in schema["required"]
        assert schema["properties"]["parents"]["description"].startswith("`sha256` of each record")


def test_the_weights_hash_is_over_sorted_names_and_contents_of_safetensors_only(tmp_path):
    for name in ("model-00002.safetensors", "model-00001.safetensors"):
        save_file({name: np.arange(4, dtype=np.float32)}, tmp_path / name)
    (tmp_path / "README.md").write_text("card")
    hashes = [
        [name, hashlib.sha256((tmp_path / name).read_bytes()).hexdigest()]
        for name in ("model-00001.safetensors", "model-00002.safetensors")
    ]
    text = json.dumps(hashes, separators=(",", ":"))
    assert weights_sha256(tmp_path) == hashlib.sha256(text.encode()).hexdigest()


@pytest.mark.parametrize("change", ["content", "name", "more"])
def test_any_change_of_the_weights_changes_the_hash(tmp_path, change):
    path = tmp_path / "model.safetensors"
    save_file({"w": np.zeros(4, dtype=np.float32)}, path)
    before = weights_sha256(tmp_path)
    match change:
        case "content":
            save_file({"w": np.array([0, 0, 0, -0.0], dtype=np.float32)}, path)
        case "name":
            path.rename(tmp_path / "weights.safetensors")
        case "more":
            save_file({"v": np.zeros(1)}, tmp_path / "more.safetensors")
    assert weights_sha256(tmp_path) != before


def test_a_directory_without_weights_is_refused(tmp_path):
    with pytest.raises(IntegrityError, match=r"holds no \*\.safetensors file"):
        weights_sha256(tmp_path)
