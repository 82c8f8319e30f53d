"""What is written is what `from_pretrained` reads."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from llmtrain.config.compose import load_config
from llmtrain.data.tokenizer import collect_characters, train_bpe
from llmtrain.errors import CheckpointMismatch, IntegrityError
from llmtrain.models import directory
from llmtrain.models.build import build


@pytest.fixture(scope="module")
def tokenizer_directory(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer")
    train_bpe(["the quick brown fox jumps over the lazy dog " * 20], 300, path)
    return path


@pytest.fixture
def network():
    torch.manual_seed(0)
    return build(load_config(["model=qwen3_tiny"]).model)


def test_the_directory_loads_with_equal_tensors_equal_logits_and_its_tokenizer(network, tokenizer_directory, tmp_path):
    directory.save(network, tokenizer_directory, tmp_path / "model", card="# card")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    for name, tensor in network.state_dict().items():
        assert torch.equal(tensor, loaded.state_dict()[name]), name
    ids = torch.arange(20)[None]
    assert torch.equal(network.eval()(input_ids=ids).logits, loaded.eval()(input_ids=ids).logits)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert tokenizer.decode(tokenizer("the lazy dog").input_ids) == "the lazy dog"
    ends = GenerationConfig.from_pretrained(tmp_path / "model").eos_token_id
    assert ends == tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|im_end|>"])  # of a text, of a turn
    assert (tmp_path / "model" / "README.md").read_text() == "# card"
    assert not (tmp_path / "model.writing").exists()


def test_a_write_that_differs_from_the_live_weights_is_refused_and_leaves_nothing(
    network, tokenizer_directory, tmp_path, monkeypatch
):
    honest = type(network).save_pretrained

    def dishonest(self, path, **options):
        honest(self, path, **options)
        tensors = load_file(path / "model.safetensors")
        tensors["model.norm.weight"][0] += 1
        save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})

    monkeypatch.setattr(type(network), "save_pretrained", dishonest)
    with pytest.raises(IntegrityError, match=r"model\.norm\.weight"):
        directory.save(network, tokenizer_directory, tmp_path / "model", card="")
    assert list(tmp_path.iterdir()) == []


def test_generation_ends_where_the_parent_said_too(network, tokenizer_directory, tmp_path):
    network.generation_config.eos_token_id = 7
    directory.save(network, tokenizer_directory, tmp_path / "model", card="")
    ends = AutoTokenizer.from_pretrained(tokenizer_directory).convert_tokens_to_ids(["<|endoftext|>", "<|im_end|>"])
    assert GenerationConfig.from_pretrained(tmp_path / "model").eos_token_id == [7, *ends]


def test_a_tokenizer_without_a_template_ends_generation_with_the_text_alone(tmp_path):
    collect_characters(["abc"], tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert directory.stop_ids(tokenizer) == [tokenizer.eos_token_id]


def test_a_directory_that_lacks_a_tensor_is_refused_and_not_filled_with_noise(network, tmp_path):
    network.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointMismatch, match=r"lacks 1 .*model\.layers\.1\.mlp\.up_proj\.weight"):
        directory.load(tmp_path)


def test_a_pickle_is_not_opened(network, tmp_path):
    network.config.save_pretrained(tmp_path)
    torch.save(network.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointMismatch, match=str(tmp_path)):
        directory.load(tmp_path)


def test_a_directory_without_a_model_is_named(tmp_path):
    with pytest.raises(CheckpointMismatch, match=str(tmp_path)):
        directory.load(tmp_path)
