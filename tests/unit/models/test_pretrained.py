"""Published models: what is taken, what is refused, and with which remedy."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from llmtrain.config.compose import load_config
from llmtrain.config.model import HFModel
from llmtrain.errors import UnsupportedModel, UserError
from llmtrain.models.build import build
from llmtrain.models.pretrained import describe, directory_shape_sha256, locate

TINY = {"vocab_size": 300, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}


def published(path: Path | str, *overrides: str) -> HFModel:
    model = load_config(["model=hf", f"model.path={path}", "model.name=published", *overrides]).model
    assert isinstance(model, HFModel)
    return model


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    config = LlamaConfig(**TINY, num_attention_heads=2, max_position_embeddings=77)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "llama")
    return tmp_path / "llama"


def test_a_directory_says_what_the_rest_of_the_config_must_fit(llama: Path):
    assert locate(published(llama), print) == llama
    found = describe(llama)
    assert (found.vocab_size, found.max_position_embeddings) == (300, 77)


def test_the_names_of_gpt2_are_understood(tmp_path: Path):
    GPT2LMHeadModel(GPT2Config(vocab_size=300, n_positions=55, n_embd=32, n_layer=1, n_head=2)).save_pretrained(
        tmp_path
    )
    found = describe(tmp_path)
    assert (found.vocab_size, found.max_position_embeddings) == (300, 55)


def test_identity_is_the_content_and_not_the_place(llama: Path, tmp_path: Path):
    here = describe(llama)
    assert len(here.weights_sha256) == 64  # hashed when it is first asked for
    there = describe(llama.rename(tmp_path / "moved"))
    assert (here.weights_sha256, here.shape_sha256) == (there.weights_sha256, there.shape_sha256)
    tensors = load_file(tmp_path / "moved" / "model.safetensors")
    tensors["model.norm.weight"][0] += 1
    save_file(tensors, tmp_path / "moved" / "model.safetensors", metadata={"format": "pt"})
    changed = describe(tmp_path / "moved")
    assert changed.weights_sha256 != here.weights_sha256
    assert changed.shape_sha256 == here.shape_sha256


@pytest.mark.parametrize(
    ("key", "value", "equal"),
    [("rope_parameters", {"rope_type": "default", "rope_theta": 5.0}, False), ("num_attention_heads", 1, False),
     ("attention_dropout", 0.5, True), ("eos_token_id", 9, True), ("dtype", "bfloat16", True)],
)  # fmt: skip
def test_shape_is_what_is_computed(llama: Path, key, value, equal):
    before, config = directory_shape_sha256(llama), json.loads((llama / "config.json").read_text())
    (llama / "config.json").write_text(json.dumps(config | {key: value}))
    assert (directory_shape_sha256(llama) == before) is equal


def test_a_model_loaded_and_written_again_has_the_same_shape(llama: Path, tmp_path: Path):
    LlamaForCausalLM.from_pretrained(llama).save_pretrained(tmp_path / "again")
    assert describe(tmp_path / "again").shape_sha256 == describe(llama).shape_sha256


def test_a_pickle_is_refused_with_the_reason_and_the_remedy(llama: Path):
    (llama / "model.safetensors").unlink()
    (llama / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'echo'\ntR.")
    with pytest.raises(UserError, match=r"pickle \(pytorch_model\.bin\), which can run any code.*save_pretrained"):
        locate(published(llama), print)


def test_code_that_comes_with_a_model_is_never_run(llama: Path, tmp_path: Path):
    config = json.loads((llama / "config.json").read_text())
    auto_map = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    (llama / "config.json").write_text(json.dumps(config | {"model_type": "evil", "auto_map": auto_map}))
    (llama / "evil.py").write_text(f"open('{tmp_path}/was_run', 'w')\nclass Config: pass\nclass Model: pass\n")
    with pytest.raises(UnsupportedModel, match="never runs code that comes with a model"):
        describe(llama)
    assert not (tmp_path / "was_run").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda path: (path / "config.json").unlink(), r"has no config\.json"),
        (lambda path: (path / "model.safetensors").unlink(), r"has no \*\.safetensors file"),
        (lambda path: (path / "adapter_config.json").write_text("{}"), "holds an adapter, not a whole model"),
        (
            lambda path: (
                path / "model.safetensors.index.json"
            ).write_text('{"weight_map": {"a": "model-2.safetensors"}}'),
            r"lacks 1 of 1 files of weights \(model-2\.safetensors\)",
        ),
    ],
)  # fmt: skip
def test_a_directory_that_is_no_whole_model_is_refused(llama: Path, change, message):
    change(llama)
    with pytest.raises(UserError, match=message):
        locate(published(llama), print)


def test_an_architecture_that_transformers_does_not_know_is_named(llama: Path):
    config = json.loads((llama / "config.json").read_text())
    (llama / "config.json").write_text(json.dumps(config | {"model_type": "unheard_of"}))
    with pytest.raises(UnsupportedModel, match="unheard_of"):
        describe(llama)


def test_a_directory_has_no_revision(llama: Path):
    with pytest.raises(UserError, match=r"set model\.revision=null"):
        locate(published(llama, "model.revision=main"), print)


def test_what_is_neither_directory_nor_hub_id_is_refused_at_once():
    with pytest.raises(UserError, match="no such directory, and no hub id"):
        locate(published("/no/such/place"), print)


def test_without_a_network_the_message_says_what_to_do(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"(?s)Set model\.path to a local directory, or check.*HF_HUB_OFFLINE"):
        locate(published("no-such-owner/no-such-model"), lambda line: None)


def test_a_qwen3_of_ours_is_a_published_model_too(tmp_path: Path):
    build(load_config(["model=qwen3_tiny"]).model).save_pretrained(tmp_path)
    assert (describe(tmp_path).vocab_size, describe(tmp_path).max_position_embeddings) == (512, 256)
