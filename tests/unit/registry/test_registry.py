"""name@version is immutable, lineage is kept, and neither kills nor races make MLflow and the journal disagree."""

import multiprocessing
import os
import time

import pytest
from mlflow import MlflowClient

from llmtrain.errors import IntegrityError, UserError
from llmtrain.journal import Journal
from llmtrain.registry import registry as registry_module
from llmtrain.registry.registry import Registry
from llmtrain.telemetry.database import database_path, open_database


def processes(*works) -> list[int | None]:
    """Exit codes of processes that do `works` at once."""
    started = [multiprocessing.get_context("fork").Process(target=work) for work in works]
    for process in started:
        process.start()
    for process in started:
        process.join()
    return [process.exitcode for process in started]


def told(outputs) -> list[str]:
    return [event["facts"]["version"] for event in Journal(outputs).events() if event["event"] == "model.registered"]


def test_a_version_is_read_back_as_it_was_registered(outputs, trained):
    registry = Registry(outputs)
    first = registry.register("demo", trained(), tracker_run_id="abc123")
    second = registry.register("demo", trained("run2", dataset_sha256="more"), tracker_run_id=None)
    assert (first.label, second.label) == ("demo@1.0.0", "demo@1.0.1")
    assert first.parents == (trained().sha256,)
    assert Registry(outputs).versions() == [first, second]
    assert told(outputs) == ["demo@1.0.0", "demo@1.0.1"]
    assert Journal(outputs).events()[0]["facts"]["sha256"] == first.sha256


def test_mlflows_pages_show_the_facts(outputs, trained):
    model = trained(trainer="dpo", parent_version="base@1.0.0")
    Registry(outputs).register("demo", model, tracker_run_id="abc123")
    (stored,) = open_database(outputs).search_model_versions("name = 'demo'")
    assert stored.run_id == "abc123"
    assert stored.source == "mlflow-artifacts:/demo/run1/model"
    assert stored.description == (
        "demo@1.0.0: dpo starting from base@1.0.0, 1,000,000 tokens, in demo/run1/model of outputs."
    )
    assert stored.tags.items() >= {
        "llmtrain.semver": "1.0.0",
        "llmtrain.run_id": "run1",
        "llmtrain.config_sha256": "config",
        "llmtrain.dataset_sha256": "dataset",
        "llmtrain.parent": "base@1.0.0",
        "llmtrain.test/loss_nats": "3.25",
    }.items()  # fmt: skip


def test_the_same_run_with_the_same_weights_keeps_its_version(outputs, trained):
    first = Registry(outputs).register("demo", trained(), tracker_run_id=None)
    assert Registry(outputs).register("demo", trained(), tracker_run_id=None) == first
    assert Registry(outputs).register("demo", trained(weights_sha256="new"), tracker_run_id=None).version == "1.0.1"
    assert told(outputs) == ["demo@1.0.0", "demo@1.0.1"]


def test_names_count_for_themselves(outputs, trained):
    registry = Registry(outputs)
    registry.register("demo", trained(), tracker_run_id=None)
    other = registry.register("other", trained(), tracker_run_id=None)
    assert other.label == "other@1.0.0"
    assert registry.versions("other") == [other]


def test_get_finds_a_version_and_a_name_alone_means_its_highest(outputs, trained):
    registry = Registry(outputs)
    versions = [
        registry.register("demo", trained(f"run{n}", recipe_sha256=f"{n}"), tracker_run_id=None) for n in range(11)
    ]
    assert registry.get("demo@1.2.0") == versions[2]
    assert registry.get("demo") == versions[10]
    assert versions[10].version == "1.10.0"


@pytest.mark.parametrize(
    ("reference", "hint"),
    [("demo@1.0.3", "did you mean demo@1.0.0?"), ("dmeo", "did you mean demo?"), ("zzz", "There are: demo@1.0.0")],
)
def test_a_reference_to_nothing_names_what_there_is(outputs, trained, reference, hint):
    Registry(outputs).register("demo", trained(), tracker_run_id=None)
    with pytest.raises(UserError) as error:
        Registry(outputs).get(reference)
    assert str(error.value).startswith(f"{reference}: no such version")
    assert hint in str(error.value)
    assert "There are: demo@1.0.0" in str(error.value)


def test_latest_is_the_newest_of_any_name_that_fits(outputs, trained):
    registry = Registry(outputs)
    registry.register("demo", trained("run1"), tracker_run_id=None)
    newest = registry.register("another", trained("run2"), tracker_run_id=None)
    registry.register("demo", trained("run3", trainer="dpo"), tracker_run_id=None)
    registry.register("demo", trained("run4", shape_sha256="wide"), tracker_run_id=None)
    registry.register("demo", trained("run5", tokenizer_sha256="chinese"), tracker_run_id=None)
    assert registry.latest("shape", "tokenizer") == newest
    assert registry.latest("shape", "tokenizer", trainer="dpo").model.run_id == "run3"
    assert registry.latest("deep", "tokenizer") is None


def test_reading_empty_outputs_finds_nothing_and_creates_nothing(tmp_path):
    registry = Registry(tmp_path / "outputs")
    assert registry.versions() == []
    assert registry.latest("shape", "tokenizer") is None
    with pytest.raises(UserError, match="has no registered model yet"):
        registry.get("demo")
    assert not (tmp_path / "outputs").exists()


@pytest.mark.parametrize("name", ["a/b", "a:b", "a@b", "it's", "", " demo"])
def test_a_name_that_cannot_be_one_is_refused_before_anything_is_made(tmp_path, trained, name):
    with pytest.raises(UserError, match="cannot name a registered model"):
        Registry(tmp_path).register(name, trained(), tracker_run_id=None)
    assert list(tmp_path.iterdir()) == []


def test_what_others_put_into_mlflow_is_left_alone(outputs, trained):
    client = open_database(outputs)
    client.create_registered_model("demo")
    client.create_model_version("demo", source="s3://bucket/model")
    assert Registry(outputs).versions() == []
    assert Registry(outputs).register("demo", trained(), tracker_run_id=None).version == "1.0.0"


def test_a_number_whose_version_was_deleted_is_never_given_again(outputs, trained):
    registry = Registry(outputs)
    registry.register("demo", trained("run1"), tracker_run_id=None)
    registry.register("demo", trained("run2"), tracker_run_id=None)
    open_database(outputs).delete_model_version("demo", "2")
    assert registry.register("demo", trained("run3"), tracker_run_id=None).label == "demo@1.0.2"
    assert told(outputs) == ["demo@1.0.0", "demo@1.0.1", "demo@1.0.2"]


def test_a_damaged_record_is_named(outputs, trained):
    Registry(outputs).register("demo", trained(), tracker_run_id=None)
    open_database(outputs).set_model_version_tag("demo", "1", registry_module.RECORD_TAG, "{}")
    with pytest.raises(IntegrityError, match="version 1 of demo in MLflow has no ModelVersion"):
        Registry(outputs).versions()


def test_verify_finds_one_flipped_bit_and_missing_files(outputs, trained):
    registry = Registry(outputs)
    version = registry.register("demo", trained(outputs=outputs), tracker_run_id=None)
    registry.verify(version)
    weights = registry.directory(version) / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(IntegrityError, match=r"demo@1\.0\.0: the weights in .* have SHA-256"):
        registry.verify(version)
    weights.unlink()
    with pytest.raises(IntegrityError, match="holds no"):
        registry.verify(version)
    weights.parent.rmdir()
    with pytest.raises(UserError, match=r"demo@1\.0\.0 is registered, but its files are gone from .*run1"):
        registry.verify(version)


@pytest.mark.parametrize("after", ["register", "versions"])
def test_a_kill_between_mlflow_and_the_journal_is_mended_by_the_next_use(outputs, trained, after):
    def register_and_die() -> None:
        registry_module.Journal.append = lambda *_, **__: os._exit(9)
        Registry(outputs).register("demo", trained(), tracker_run_id=None)

    assert processes(register_and_die) == [9]
    assert told(outputs) == []
    registry = Registry(outputs)
    if after == "register":
        assert registry.register("demo", trained(), tracker_run_id=None).version == "1.0.0"
    assert [version.label for version in registry.versions()] == ["demo@1.0.0"]
    assert told(outputs) == ["demo@1.0.0"]
    assert Journal(outputs).verify() == 1


def test_a_kill_before_mlflow_has_the_version_leaves_none(outputs, trained):
    def register_and_die() -> None:
        MlflowClient.create_model_version = lambda *_, **__: os._exit(9)
        Registry(outputs).register("demo", trained(), tracker_run_id=None)

    assert processes(register_and_die) == [9]
    assert Registry(outputs).versions() == []
    assert Registry(outputs).register("demo", trained(), tracker_run_id=None).version == "1.0.0"
    assert told(outputs) == ["demo@1.0.0"]


def test_processes_that_register_at_once_in_new_outputs_get_different_versions(tmp_path, trained):
    start_at = time.monotonic() + 0.5

    def register(process: int) -> None:
        time.sleep(start_at - time.monotonic())
        for number in range(3):
            Registry(tmp_path).register("demo", trained(f"run {process} {number}"), tracker_run_id=None)

    assert processes(lambda: register(0), lambda: register(1)) == [0, 0]
    labels = [version.label for version in Registry(tmp_path).versions()]
    assert labels == [f"demo@1.0.{patch}" for patch in range(6)]
    assert told(tmp_path) == labels
    assert Journal(tmp_path).verify() == 6
    assert database_path(tmp_path).exists()


def test_latest_is_what_was_registered_last_though_the_clock_jumped_back_in_between(outputs, trained, monkeypatch):
    first = Registry(outputs).register("demo", trained("run1"), tracker_run_id=None)
    now = time.time()
    with monkeypatch.context() as patched:
        patched.setattr(time, "time", lambda: now - 86_400)
        last = Registry(outputs).register("another", trained("run2"), tracker_run_id=None)
    stored = {version.name: version for version in open_database(outputs).search_model_versions()}
    assert stored["another"].creation_timestamp < stored["demo"].creation_timestamp, "the clock did jump"
    assert Registry(outputs).versions() == [first, last]
    assert Registry(outputs).latest("shape", "tokenizer") == last


def test_an_alias_of_mlflow_names_a_version(outputs, trained):
    registry = Registry(outputs)
    registry.register("demo", trained(), tracker_run_id=None)
    second = registry.register("demo", trained("run2", dataset_sha256="more"), tracker_run_id=None)
    (stored,) = [
        one for one in open_database(outputs).search_model_versions("name = 'demo'") if one.version in (2, "2")
    ]
    open_database(outputs).set_registered_model_alias("demo", "champion", stored.version)
    assert registry.get("demo@champion") == second
    with pytest.raises(UserError, match="demo@challenger: no such version"):
        registry.get("demo@challenger")
    with pytest.raises(UserError, match="other@champion: no such version"):
        registry.get("other@champion")
