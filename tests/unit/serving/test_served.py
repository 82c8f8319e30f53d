"""What an endpoint serves comes from the model's records; what is not there is named, with how to make it."""

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch

from llmtrain.artifacts import OptimisedModel, TrainedModel, weights_sha256
from llmtrain.cli.serve import main
from llmtrain.config.compose import Composer, load_config
from llmtrain.config.frozen import FrozenRun, Resolved
from llmtrain.config.serve import ServeConfig
from llmtrain.data.tokenizer import train_bpe
from llmtrain.errors import IntegrityError, UserError
from llmtrain.files import sha256_of
from llmtrain.models import directory as model_directory
from llmtrain.models.build import build
from llmtrain.serving.served import served_model, serving_directory


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of `outputs/tiny`, trained in bf16, of a model that nobody trained."""
    outputs = tmp_path_factory.mktemp("outputs")
    train_bpe(["the quick brown fox jumps over the lazy dog " * 20], 300, outputs / "tokenizer")
    run = outputs / "tiny" / "0123456789ab"
    config = load_config(["model=qwen3_tiny", "infra.precision=bf16"])
    torch.manual_seed(0)
    model_directory.save(build(config.model), outputs / "tokenizer", run / "model", card="")
    nothing = dict.fromkeys(name for name in Resolved.model_fields)
    texts = dict.fromkeys(("tokenizer_path", "tokenizer_sha256", "text_path", "text_sha256"), "there")
    frozen = FrozenRun(config=config, resolved=Resolved(**{**nothing, **texts}), attempt=1)
    (run / "config.json").write_text(frozen.model_dump_json())
    hashes = dict.fromkeys(
        ("shape_sha256", "tokenizer_sha256", "config_sha256", "dataset_sha256", "recipe_sha256"), "0"
    )
    TrainedModel(
        parents=(), run_id=run.name, path="tiny/0123456789ab/model", trainer="pretrain", parent_version=None,
        weights_sha256=weights_sha256(run / "model"), num_tokens_seen=1, metrics={}, **hashes,
    ).write(run / "trained.json")  # fmt: skip
    return outputs


def config(outputs: Path, *overrides: str) -> ServeConfig:
    lines = [f"outputs_dir={outputs}", *overrides]
    return Composer((), "serve", root=ServeConfig).check(lines).good()


def run_of(outputs: Path) -> str:
    return f"run={outputs}/tiny/0123456789ab"


def test_all_that_an_engine_needs_comes_from_the_models_records(outputs: Path):
    served, directory = served_model(config(outputs, run_of(outputs)))
    assert directory == outputs / "tiny" / "0123456789ab" / "model"
    assert (served.name, served.form, served.precision) == ("tiny", "trained", "bf16")  # as the run was trained
    assert served.context_tokens == 256  # conf/model/qwen3_tiny.yaml
    assert served.stop_ids == tuple(json.loads((directory / "generation_config.json").read_text())["eos_token_id"])
    template = (directory / "chat_template.jinja").read_bytes()
    assert served.template_sha256 == hashlib.sha256(template).hexdigest()
    assert served.weights_sha256 == weights_sha256(directory)
    record = TrainedModel.read(directory.parent / "trained.json")
    assert served.parents == (record.sha256,)


def test_a_model_that_llmtrain_did_not_train_has_the_precision_of_its_weights(outputs: Path):
    served, _ = served_model(config(outputs, f"run={outputs}/tiny/0123456789ab/model", "serving.name=mine"))
    assert (served.name, served.precision, served.parents) == ("mine", "fp32", ())


def test_a_shorter_context_is_served_and_a_longer_one_refused(outputs: Path):
    served, _ = served_model(config(outputs, run_of(outputs), "serving.context_tokens=64"))
    assert served.context_tokens == 64
    assert serving_directory(served, outputs).name.startswith("tiny-")
    with pytest.raises(UserError, match=r"serving.context_tokens=257 is more than the 256 tokens"):
        served_model(config(outputs, run_of(outputs), "serving.context_tokens=257"))


def test_a_form_that_is_not_there_is_refused_with_the_command_that_makes_it(outputs: Path):
    with pytest.raises(UserError) as refused:
        served_model(config(outputs, run_of(outputs), "serving=onnx"))
    assert f"llmtrain optimise {run_of(outputs)} optimise=onnx_int8 outputs_dir={outputs}" in str(refused.value)


def test_a_form_is_found_by_the_weights_it_was_made_from_and_its_files_are_checked(outputs: Path):
    source = weights_sha256(outputs / "tiny" / "0123456789ab" / "model")
    directory = outputs / "optimised" / source[:12] / "onnx_int8"
    directory.mkdir(parents=True)
    (directory / "model.onnx").write_bytes(b"a graph")
    made = OptimisedModel(
        parents=(), form="onnx_int8", path=f"optimised/{source[:12]}/onnx_int8", source_weights_sha256=source,
        files={"model.onnx": sha256_of(directory / "model.onnx")}, settings={}, num_bytes=7, metrics={},
    )  # fmt: skip
    made.write(directory / "optimised.json")
    chosen = config(outputs, run_of(outputs), "serving=onnx", "serving.form=onnx_int8")
    served, found = served_model(chosen)
    assert found == directory
    assert served.form == "onnx_int8"
    assert made.sha256 in served.parents
    (directory / "model.onnx").write_bytes(b"another")
    with pytest.raises(IntegrityError, match=r"model\.onnx is not what was made; delete"):
        served_model(chosen)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([], "name one model: version=NAME@VERSION"),
        (["version=a@1", "run=b"], "name one model: version=NAME@VERSION"),
        (["version=nobody@1.0.0"], "nobody@1.0.0: no such version"),
        (["run=nowhere"], "run=nowhere: no finished run and no model is in that directory"),
        (["version=a", "serving=vlm"], "no option 'vlm'"),
        (["version=a", "trainer=dpo"], "trainer: is a group of `python train.py`, which this command does not have"),
        (["version=a", "serving.port=70000"], "serving.port: got 70000, wants a whole number >= 0 and <= 65535"),
        (["version=a", "infra=slurm"], "this command works on the machine that it is typed on"),
    ],
)
def test_a_wrong_command_line_says_what_to_do(overrides, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(overrides) == 2
    told = capsys.readouterr()
    assert message in told.err
    assert "Traceback" not in told.err
    assert not (tmp_path / "outputs").exists()


def test_the_composed_config_is_shown(capsys):
    assert main(["--cfg", "job", "version=chat@1.2.0", "serving=onnx"]) == 0
    shown = capsys.readouterr().out
    assert "version: chat@1.2.0" in shown
    assert "form: onnx_int8" in shown
    assert "hydra" not in shown
    assert main(["--help"]) == 0
    assert "serving=" in capsys.readouterr().out


def test_a_damaged_generation_config_is_named(outputs: Path, tmp_path: Path):
    copy = shutil.copytree(outputs / "tiny" / "0123456789ab" / "model", tmp_path / "model")
    (copy / "generation_config.json").write_text("{")
    with pytest.raises(UserError, match=r"generation_config\.json is not JSON .* restore it"):
        served_model(config(outputs, f"run={copy}"))
