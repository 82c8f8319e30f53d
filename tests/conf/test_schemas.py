"""docs/schemas: what editors check option files with, and what the files of runs look like to others."""

import json
import re
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft7Validator, Draft202012Validator
from omegaconf import OmegaConf

from llmtrain.artifacts import OptimisedModel, Record, ServedModel
from llmtrain.config.frozen import FrozenRun
from llmtrain.config.json_schema import conf_schemas
from llmtrain.config.options import conf_directory
from llmtrain.launch.starts import Start
from llmtrain.launch.sweeps import Sweep
from llmtrain.plan.records import PlanVsActual, Prediction
from llmtrain.report.records import Margins, Processes, Samples
from llmtrain.telemetry.database import open_database
from llmtrain.telemetry.vitals import Vitals
from tests.conf.conftest import Runs

CONF = conf_directory()
SCHEMAS = Path(__file__).parents[2] / "docs" / "schemas"
SOMETIMES = {"plan/kernels-*.json"}
"""A busy machine's timings are not kept."""
OF_ENGINES = {"*/*/starts.jsonl", "*/*/log.txt", "log-*.txt"}
SERVED = [OptimisedModel, ServedModel]
"""Written where a model is optimised or served: tests/e2e/test_litserve.py."""
RECORDS = [
    *(one for one in Record.__subclasses__() if one not in SERVED),
    FrozenRun,
    Samples,
    Margins,
    Processes,
    Vitals,
    Prediction,
    PlanVsActual,
]
LAUNCHED = [Sweep, Start]
"""Written where runs are submitted and by what an engine starts: tests/e2e/test_detached.py."""
WRITTEN_BY_HAND = {"MetricsRow", "JournalEvent"}


def stored(name: str) -> Any:
    return json.loads((SCHEMAS / f"{name}.json").read_text())


def read_as_hydra(path: Path) -> Any:
    """Numbers as Hydra's loader reads them, `???` and `${...}` left as text."""
    return OmegaConf.to_container(OmegaConf.load(path))


def schema_of(path: Path) -> str:
    return path.stem if path.parent == CONF else path.parent.name


@pytest.mark.parametrize("name", conf_schemas())
def test_schema_of_a_group_is_up_to_date(name: str):
    assert stored(f"conf/{name}") == conf_schemas()[name], "run scripts/schemas"


@pytest.mark.parametrize("record", [*RECORDS, *LAUNCHED, *SERVED])
def test_schema_of_a_record_is_up_to_date(record: type[Record]):
    assert stored(f"records/{record.__name__}") == record.model_json_schema(), "run scripts/schemas"


def test_there_is_no_schema_of_something_that_is_gone():
    assert {path.stem for path in SCHEMAS.glob("conf/*")} == conf_schemas().keys()
    assert {path.stem for path in SCHEMAS.glob("records/*")} == {
        record.__name__ for record in [*RECORDS, *LAUNCHED, *SERVED]
    } | WRITTEN_BY_HAND


@pytest.mark.parametrize("path", sorted(CONF.rglob("*.yaml")), ids=lambda path: str(path.relative_to(CONF)))
def test_shipped_file_is_accepted_and_its_editor_finds_the_schema(path: Path, repository: Path):
    Draft7Validator(stored(f"conf/{schema_of(path)}")).validate(read_as_hydra(path))
    editor = json.loads((repository / ".vscode" / "settings.json").read_text())
    place = str(path.relative_to(repository))
    found = [schema for schema, pattern in editor["yaml.schemas"].items() if fnmatch(place, pattern)]
    assert found == [f"docs/schemas/conf/{schema_of(path)}.json"]
    assert editor["yaml.yamlVersion"] == "1.1"  # YAML 1.2 takes 600_000 for text


@pytest.mark.parametrize(
    ("name", "text", "complaint"),
    [
        ("trainer", "warmup_token: 3", "'warmup_token' was unexpected"),
        ("trainer", "lr: fast", "'fast' is not valid"),
        ("trainer", "lr: 0", "0 is not valid"),
        ("trainer", "adam_beta1: 1.0", "1.0 is not valid"),
        ("trainer", "batch_rows: 1.5", "1.5 is not valid"),
        ("trainer", "{kind: pretrain, beta: 0.1}", "'beta' is not one of"),
        ("trainer", "kind: ppo", "'ppo' is not valid"),
        ("infra", "precision: fp16", "'fp16' is not valid"),
        ("infra", "deterministic: 1", "1 is not valid"),
        ("data", "corpus: {kind: files, paths: [], licence: MIT}", "is not valid"),
        ("data", "corpus: {kind: python_docs, licence: MIT}", "is not valid"),
        ("model", "tokenizer: {kind: bpe, vocab_siz: 512}", "is not valid"),
        ("model", "trainer: {lr: 0.1}", "'trainer' was unexpected"),
        ("experiment", "trainer: {lrr: 0.1}", "is not valid"),
        ("experiment", "hydra: {run: {dir: x}}", "'hydra' was unexpected"),
        ("train", "schema_version: 0", "0 is not valid"),
    ],
)
def test_mistake_in_an_option_file_is_refused(name: str, text: str, complaint: str, tmp_path: Path):
    (tmp_path / "option.yaml").write_text(text)
    (error,) = Draft7Validator(stored(f"conf/{name}")).iter_errors(read_as_hydra(tmp_path / "option.yaml"))
    assert complaint in error.message


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("trainer", "lr: ???"),
        ("trainer", "warmup_tokens: ${trainer.log_every_tokens}"),
        ("trainer", "{defaults: [pretrain], lr: 1e-4, budget_tokens: 1_000}"),
        ("data", "corpus: ???"),
        ("data", "corpus: {licence: MIT}"),
        ("data", "pairs: {kind: continuations, max_training_pairs: null}"),
        ("experiment", "{defaults: [{override /model: qwen3_tiny}], name: mine, model: {hidden_size: 32}}"),
    ],
)
def test_what_an_option_may_leave_open_or_say_alone_is_accepted(name: str, text: str, tmp_path: Path):
    (tmp_path / "option.yaml").write_text(text)
    Draft7Validator(stored(f"conf/{name}")).validate(read_as_hydra(tmp_path / "option.yaml"))


def test_each_key_has_its_meaning_for_the_editor():
    def bare(schema: Any, place: str) -> list[str]:
        inner = [one for part in schema.get("anyOf", []) for one in bare(part, place)]
        for name, value in schema.get("properties", {}).items():
            inner += ([] if value["description"] else [f"{place}.{name}"]) + bare(value, f"{place}.{name}")
        return inner

    assert [key for name in conf_schemas() for key in bare(stored(f"conf/{name}"), name)] == []


def written_by(runs: Runs) -> dict[str, list[Any]]:
    """The records that the runs wrote, by the name of the schema; of files of lines, each line."""
    outputs = runs.directory / "outputs"
    places = {schema: place for place, schema in listed_files() if schema}
    return {
        name: [
            json.loads(text)
            for path in sorted(outputs.glob(place))
            for text in (path.read_text().splitlines() if path.suffix == ".jsonl" else [path.read_text()])
        ]
        for name, place in places.items()
    }


def listed_files() -> list[tuple[str, str]]:
    """The files of docs/interfaces.md as globs under outputs, and the schema that each links, or nothing."""
    table = (SCHEMAS.parent / "interfaces.md").read_text().partition("## Files\n")[2].partition("## ")[0]
    rows = [line.split("|")[1:-1] for line in table.splitlines() if line.startswith("| `")]
    return [
        (re.sub(r"<[^>]+>", "*", place), "".join(re.findall(r"records/(\w+)\.json", schema)))
        for paths, _, schema in rows
        for place in re.findall(r"`([^`]+)`", paths)
    ]


@pytest.mark.parametrize("name", [*(record.__name__ for record in RECORDS), *sorted(WRITTEN_BY_HAND)])
def test_what_runs_write_is_what_the_schema_says(runs: Runs, name: str):
    judge = Draft202012Validator(stored(f"records/{name}"))
    records = written_by(runs)[name]
    assert len(records) >= 2
    for record in records:
        judge.validate(record)
        assert not judge.is_valid({**record, "one_more": 1})
    for key in judge.schema["required"]:
        assert not judge.is_valid({other: value for other, value in records[0].items() if other != key}), key


def test_runs_write_the_files_that_are_listed_and_no_others(runs: Runs):
    outputs = runs.directory / "outputs"
    written = {path for path in outputs.rglob("*") if path.is_file()}
    listed = {place: set(outputs.glob(place)) for place, _ in listed_files()}
    missing = {place for place, found in listed.items() if not found}
    missing = {
        place for place in missing if not place.startswith(("sweeps/", "local-", "llmtrain-", "serving/", "optimised/"))
    }
    assert missing <= SOMETIMES | OF_ENGINES
    assert written - set.union(*listed.values()) == set()


def test_a_database_of_ours_waits_as_long_as_is_listed(runs: Runs):
    client = open_database(runs.directory / "outputs")
    with client._tracking_client.store.engine.connect() as connection:
        ((milliseconds,),) = connection.exec_driver_sql("PRAGMA busy_timeout").all()
    assert f"`busy_timeout={milliseconds}`" in (SCHEMAS.parent / "interfaces.md").read_text()
