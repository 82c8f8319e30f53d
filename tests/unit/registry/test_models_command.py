"""`llmtrain models`."""

import json

from llmtrain.artifacts import ModelVersion
from llmtrain.cli.models import main
from llmtrain.registry.registry import Registry


def test_the_tree_is_printed(outputs, trained, capsys):
    Registry(outputs).register("demo", trained(), tracker_run_id=None)
    assert main(["--outputs", str(outputs)]) == 0
    assert capsys.readouterr().out.startswith("demo@1.0.0  pretrain")


def test_json_is_the_records(outputs, trained, capsys):
    version = Registry(outputs).register("demo", trained(), tracker_run_id=None)
    assert main(["--outputs", str(outputs), "--json"]) == 0
    assert [ModelVersion.model_validate(record) for record in json.loads(capsys.readouterr().out)] == [version]


def test_missing_and_empty_outputs_are_said_plainly(tmp_path, capsys):
    assert main(["--outputs", str(tmp_path / "absent")]) == 0
    assert "There is no directory" in capsys.readouterr().out
    assert main(["--outputs", str(tmp_path)]) == 0
    assert "No model is registered in" in capsys.readouterr().out
    assert main(["--outputs", str(tmp_path), "--json"]) == 0
    assert capsys.readouterr().out == "[]\n"
