"""From a directory to a form that is kept, found again, or refused."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from llmtrain.artifacts import OptimisedModel, weights_sha256
from llmtrain.config.optimise import Optimise
from llmtrain.errors import NotBetter, UserError
from llmtrain.files import sha256_of
from llmtrain.optimise.optimise import optimise
from tests.unit.optimise.conftest import settings

ANYTHING = ("most_perplexity_increase=9", "least_agreement=0")
Made = Callable[[Optimise], tuple[OptimisedModel, list[str]]]


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("outputs")


@pytest.fixture(scope="module")
def make(sources, outputs: Path) -> Made:
    """Makes a form of the tied model; the record, and what was said."""

    def made(config: Optimise) -> tuple[OptimisedModel, list[str]]:
        said: list[str] = []
        source = sources("tied")
        record = optimise(source, weights_sha256(source), ("parent",), outputs, config, said.append, threads=1)
        return record, said

    return made


@pytest.fixture(scope="module")
def int8(make: Made) -> OptimisedModel:
    return make(settings("onnx_int8", *ANYTHING))[0]


def test_the_directory_is_whole_and_the_record_says_what_is_in_it(int8: OptimisedModel, outputs: Path, sources):
    digits = weights_sha256(sources("tied"))[:12]
    assert int8.path == f"optimised/{digits}/onnx_int8"
    directory = outputs / int8.path
    assert {path.name for path in directory.iterdir()} == {*int8.files, "optimised.json"}
    assert {"model.onnx", "model.onnx.data", "config.json", "generation_config.json", "optimised.png"} <= set(
        int8.files
    )
    assert all(sha256_of(directory / name) == known for name, known in int8.files.items())
    assert OptimisedModel.read(directory / "optimised.json") == int8
    assert int8.parents == ("parent",)
    assert int8.num_bytes == sum((directory / name).stat().st_size for name in ("model.onnx", "model.onnx.data"))
    assert [path.name for path in directory.parent.iterdir() if not path.name.startswith("onnx_int8")] == []


def test_tokenizer_template_and_configs_are_the_source_s_byte_for_byte(int8: OptimisedModel, outputs: Path, sources):
    names = ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "config.json", "generation_config.json"]
    for name in names:
        assert (outputs / int8.path / name).read_bytes() == (sources("tied") / name).read_bytes()


def test_settings_are_those_that_change_the_result(int8: OptimisedModel):
    assert int8.settings == {
        "text_paths": "[]", "kind": "onnx", "form": "onnx_int8", "rounding": "nearest", "block_size": 32,
        "head_bits": 8, "products": "int8", "calibration_documents": 48,
    }  # fmt: skip


def test_measurements_cover_quality_speed_memory_and_bytes_of_both(int8: OptimisedModel):
    assert -0.05 < int8.metrics["perplexity_increase"] < 0.05
    assert int8.metrics["top1_agreement"] > 0.8
    names = [f"{kind}_tokens_per_second_batch_{size}" for kind in ("prefill", "decode") for size in (1, 2)]
    for prefix in ("", "torch_fp32/"):
        assert all(int8.metrics[f"{prefix}{name}"] > 0 for name in [*names, "first_token_seconds", "peak_bytes"])
    assert int8.metrics["weights_bytes"] == int8.num_bytes < int8.metrics["torch_fp32/weights_bytes"]


def test_the_same_settings_find_what_is_there(int8: OptimisedModel, make: Made):
    record, said = make(settings("onnx_int8", *ANYTHING, "rounds=3"))
    assert record == int8
    assert len(said) == 1


@pytest.fixture
def without_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a CPU that does not multiply bf16: one process less to wait for."""
    monkeypatch.setattr("llmtrain.optimise.optimise._multiplies_bf16", lambda: False)


@pytest.mark.usefixtures("without_bf16")
def test_a_damaged_file_is_made_anew(int8: OptimisedModel, make: Made, outputs: Path):
    (outputs / int8.path / "model.onnx.data").write_bytes(b"damaged")
    record, said = make(settings("onnx_int8", *ANYTHING))
    assert record.files.keys() == int8.files.keys()
    assert record.files["model.onnx.data"] == int8.files["model.onnx.data"]
    assert len(said) > 1
    assert "torch_bf16/perplexity" not in record.metrics


@pytest.mark.usefixtures("without_bf16")
def test_a_form_that_is_not_good_enough_leaves_its_measurements_only(make: Made, outputs: Path):
    config = settings("onnx_int4", "rounding=nearest", "head_bits=4", "least_agreement=1")
    with pytest.raises(NotBetter, match=r"onnx_int4 is refused: .*optimise.least_agreement asks for 100.0%") as refusal:
        make(config)
    assert refusal.value.exit_code == 3
    (left,) = (outputs / "optimised").glob("*/onnx_int4*")
    assert left.name == "onnx_int4.refused.json"
    kept = json.loads(left.read_text())
    assert kept["metrics"]["top1_agreement"] < 1
    assert len(kept["reasons"]) == 1


def test_a_form_that_is_there_is_judged_by_stricter_limits(int8: OptimisedModel, make: Made, outputs: Path):
    with pytest.raises(NotBetter, match="is refused"):
        make(settings("onnx_int8", "least_agreement=1"))
    assert (outputs / int8.path / "optimised.json").exists()


@pytest.mark.usefixtures("without_bf16")
def test_safetensors_in_8_bits_load_in_transformers(make: Made, outputs: Path, sources):
    record, _ = make(settings("int8", *ANYTHING))
    model = AutoModelForCausalLM.from_pretrained(outputs / record.path, dtype=torch.bfloat16).eval()
    original = AutoModelForCausalLM.from_pretrained(sources("tied"), dtype=torch.bfloat16).eval()
    ids = torch.arange(3, 60)[None]
    with torch.inference_mode():
        difference = (model(ids).logits - original(ids).logits).abs().max()
    assert type(model.model.layers[0].mlp.up_proj.weight).__name__ == "Int8Tensor"
    assert 0 < difference < 0.3
    assert record.num_bytes < record.metrics["torch_fp32/weights_bytes"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA packs 4 bits")
def test_safetensors_in_4_bits_say_that_they_need_cuda(make: Made):
    with pytest.raises(UserError, match="needs CUDA"):
        make(settings("int4"))
