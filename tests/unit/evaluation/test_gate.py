"""`llmtrain parity` on a directory: what it prints, writes and refuses; which record an endpoint's name means."""

import json
import os
from pathlib import Path

import pytest
from parity_models import broken, transposed_layer

from llmtrain.artifacts import Evidence, ServedModel, weights_sha256
from llmtrain.cli.parity import main
from llmtrain.errors import NotTheSameModel, UserError
from llmtrain.evaluation import gate
from llmtrain.evaluation.gate import Asking, gate_here, reference_of, served_as
from llmtrain.evaluation.parity import refuse
from llmtrain.stored import named


def silent(line: str) -> None:
    pass


def test_a_directory_is_held_against_litserves_runtime(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = [f"run={trained / 'model'}", "--outputs", str(tmp_path), "--probes", "8", "--context-tokens", "64"]
    assert main(line) == 0
    assert "LitServe's PyTorch  fp32" in capsys.readouterr().out
    place = tmp_path / "optimised" / weights_sha256(trained / "model")[:12]
    evidence = Evidence.read(place / "parity-trained-torch.json")
    assert evidence.procedure == "llmtrain.evaluation.parity"
    assert evidence.figures["passed"] == 1
    assert evidence.figures["num_probes"] == 8
    assert evidence.figures["max_abs_dlogp_nats"] < 1e-4
    assert (place / "parity.png").read_bytes().startswith(b"\x89PNG")
    assert main([*line, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["parties"]["LitServe's PyTorch"]["faults"] == []


def test_what_is_not_the_same_is_refused_and_recorded(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The runtime loads another file than the one that the gate was given."""
    wrong = broken(trained, transposed_layer, tmp_path / "wrong")
    right = gate.torch_runtime.load
    monkeypatch.setattr(gate.torch_runtime, "load", lambda directory, **settings: right(wrong, **settings))
    stored = named(str(trained / "model"), tmp_path, setting="run")
    verdicts = gate_here(stored, tmp_path, Asking(8, 64, "cpu"), silent)
    with pytest.raises(NotTheSameModel, match=r"LitServe's PyTorch: mean \|dlogp\| .* worst: probe "):
        refuse(verdicts)
    place = tmp_path / "optimised" / stored.weights_sha256[:12]
    assert Evidence.read(place / "parity-trained-torch.json").figures["passed"] == 0


def test_a_model_without_a_context_wants_one_to_be_given(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gate, "read_config", lambda directory: {})
    stored = named(str(trained / "model"), tmp_path, setting="run")
    with pytest.raises(UserError, match="--context-tokens"):
        reference_of(stored, tmp_path, Asking(8, None, "cpu"), silent)
    reference, from_checkpoint = reference_of(stored, tmp_path, Asking(8, 64, "cpu"), silent)
    assert not from_checkpoint
    assert reference.rows.context_tokens == 64


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ([], "wants one model, version="),
        (["run=a", "run=b"], "wants one model"),
        (["versoin=a@1"], "did you mean 'version'?"),
        (["run=a", "--probes", "none"], "--probes wants a whole number from 1 on, not 'none'"),
        (["run=a", "--context-tokens", "0"], "--context-tokens wants a whole number"),
        (["run=a", "--form", "onnx_int4"], "--form says what answers at a --url"),
        (["run=a", "--probe", "3"], "did you mean '--probes'?"),
    ],
)
def test_mistakes_on_the_command_line(line: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(line) == 2
    assert says in capsys.readouterr().err


def served(outputs: Path, place: str, age: int, **changed: object) -> ServedModel:
    fields = {
        "parents": (), "label": "chat@1.0.0", "name": "chat", "form": "trained", "path": "x", "weights_sha256": "ours",
        "precision": "fp32", "context_tokens": 64, "stop_ids": (), "template_sha256": None,
    }  # fmt: skip
    record = ServedModel(**fields | changed)
    directory = outputs / "serving" / place
    directory.mkdir(parents=True)
    record.write(directory / "served.json")
    os.utime(directory / "served.json", (10**9 - age, 10**9 - age))
    return record


def test_an_endpoint_is_known_by_its_newest_record_of_these_weights(tmp_path: Path) -> None:
    served(tmp_path, "a", 30, context_tokens=32)
    newest = served(tmp_path, "b", 20)
    served(tmp_path, "c", 10, weights_sha256="of another")
    served(tmp_path, "d", 5, name="other")
    assert served_as("chat", "ours", tmp_path, None) == newest
    assert served_as("chat", "unknown", tmp_path, None).weights_sha256 == "of another"
    with pytest.raises(UserError, match=r"no record of an endpoint that serves 'chat' as onnx_int4; start it"):
        served_as("chat", "ours", tmp_path, "onnx_int4")
    int4 = served(tmp_path, "e", 0, form="onnx_int4", path="optimised/ours/onnx_int4")
    with pytest.raises(UserError, match="served as onnx_int4, trained; say which one answers: --form FORM"):
        served_as("chat", "ours", tmp_path, None)
    assert served_as("chat", "ours", tmp_path, "onnx_int4") == int4
    assert served_as("chat", "ours", tmp_path, None, root=int4.path) == int4  # as LitServe says it
    assert served_as("chat", "ours", tmp_path, None, root=str((tmp_path / int4.path).resolve())) == int4  # as vLLM
