"""Adapters against their definition, by hand, and against peft's own loader."""

import math
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel

from llmtrain.config.adapter import LoRAAdapter, QLoRAAdapter
from llmtrain.config.compose import load_config
from llmtrain.errors import UserError
from llmtrain.models import adapter, directory
from llmtrain.models.adapter import adapter_off, attach, is_attached, merge, parameter_counts, save_adapter
from llmtrain.models.build import build
from llmtrain.models.logprobs import check_log_probs
from llmtrain.models.modes import evaluating

IDS = (torch.arange(48) * 7919 % 512)[None]
VARIANTS = [[], ["adapter.rslora=true"], ["adapter.dora=true"], ["adapter.targets=[q_proj,1.mlp.up_proj]"]]


def lora(*overrides: str) -> LoRAAdapter:
    settings = load_config(["adapter=lora", "adapter.rank=4", "adapter.alpha=6", "trainer=dpo", *overrides]).adapter
    assert isinstance(settings, LoRAAdapter)
    return settings


@pytest.fixture
def network() -> PreTrainedModel:
    torch.manual_seed(0)
    return build(load_config(["model=qwen3_tiny"]).model).eval()


def trained(model: PreTrainedModel) -> PreTrainedModel:
    """As if it had been trained: updates begin as zero, because B does."""
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model


@torch.no_grad()
def logits(model: PreTrainedModel) -> Tensor:
    with evaluating(model):
        return model(input_ids=IDS).logits


def difference(found: Tensor, wanted: Tensor) -> float:
    return ((found - wanted).norm() / wanted.norm()).item()


@pytest.mark.parametrize("overrides", VARIANTS, ids=str)
def test_a_fresh_adapter_changes_nothing_and_switched_off_a_trained_one_neither(network, overrides):
    base = logits(network)
    attach(network, lora(*overrides))
    assert torch.equal(logits(network), base) or difference(logits(network), base) < 1e-6  # DoRA renormalises
    trained(network)
    assert difference(logits(network), base) > 0.1
    with adapter_off(network):
        assert torch.equal(logits(network), base)
    assert difference(logits(network), base) > 0.1


@pytest.mark.parametrize("overrides", VARIANTS, ids=str)
def test_merged_logits_are_the_adapters_and_the_network_is_plain_again(network, overrides):
    names = set(network.state_dict())
    with_adapter = logits(trained(attach(network, lora(*overrides))))
    merge(network)
    assert difference(logits(network), with_adapter) <= 1e-5  # 5e-7 was seen
    assert set(network.state_dict()) == names
    assert not is_attached(network)
    assert all(parameter.requires_grad for parameter in network.parameters())


@pytest.mark.parametrize(("rslora", "scale"), [("false", 6 / 4), ("true", 6 / math.sqrt(4))])
def test_a_layer_is_w_plus_the_scaled_product_of_b_and_a(network, rslora, scale):
    layer = trained(attach(network, lora(f"adapter.rslora={rslora}"))).model.layers[0].self_attn.q_proj
    a, b, x = layer.lora_A["default"].weight, layer.lora_B["default"].weight, torch.randn(5, 64)
    torch.testing.assert_close(layer(x), x @ (layer.base_layer.weight + scale * b @ a).T)
    assert a.shape == (4, 64)


def test_dora_keeps_the_length_of_each_row_apart_from_its_direction(network):
    layer = trained(attach(network, lora("adapter.dora=true"))).model.layers[0].self_attn.q_proj
    lengths = layer.lora_magnitude_vector["default"].weight
    a, b, x = layer.lora_A["default"].weight, layer.lora_B["default"].weight, torch.randn(5, 64)
    torch.testing.assert_close(lengths, layer.base_layer.weight.norm(dim=1))
    moved = layer.base_layer.weight + 6 / 4 * b @ a
    torch.testing.assert_close(layer(x), x @ (lengths[:, None] * moved / moved.norm(dim=1, keepdim=True)).T)


def test_only_the_adapter_trains_and_is_counted_by_hand(network):
    total = sum(parameter.numel() for parameter in network.parameters())
    attach(network, lora())
    # rank * (inputs + outputs) of q, k, v, o, gate, up, down in two layers of width 64, 4 heads of 16, 2 for k and v
    by_hand = 2 * 4 * ((64 + 64) + 2 * (64 + 32) + (64 + 64) + 2 * (64 + 160) + (160 + 64))
    assert parameter_counts(network) == (by_hand, total + by_hand)
    network(input_ids=IDS).logits.sum().backward()
    assert {name for name, p in network.named_parameters() if p.grad is not None} == {
        name for name, _ in network.named_parameters() if ".lora_" in name
    }


def test_the_trainer_finds_decoder_and_output_layer_where_they_were(network):
    decoder, output = network.base_model, network.get_output_embeddings()
    attach(network, lora())
    assert (network.base_model, network.get_output_embeddings()) == (decoder, output)
    check_log_probs(network)


def test_of_the_state_only_the_updates_are_kept_and_they_bring_back_the_logits(network):
    state = adapter.trainable_state(network, network.state_dict())
    assert state.keys() == network.state_dict().keys()
    trained(attach(network, lora("adapter.dora=true")))
    state = adapter.trainable_state(network, network.state_dict())
    assert all("lora_" in name for name in state)
    torch.manual_seed(0)
    other = attach(build(load_config(["model=qwen3_tiny"]).model).eval(), lora("adapter.dora=true"))
    found = other.load_state_dict(state, strict=False)
    assert found.unexpected_keys == []
    assert torch.equal(logits(other), logits(network))


def test_dropout_is_on_in_the_updates_alone_and_evaluating_puts_it_back(network):
    trained(attach(network, lora("adapter.dropout=0.5")))
    network(input_ids=IDS)
    with torch.no_grad():
        assert not torch.equal(network(input_ids=IDS).logits, network(input_ids=IDS).logits)
    assert torch.equal(logits(network), logits(network))
    with torch.no_grad():
        assert not torch.equal(network(input_ids=IDS).logits, network(input_ids=IDS).logits)
    modes = {name for name, module in network.named_modules() if module.training}
    assert modes
    assert all("lora_dropout" in name for name in modes)


@pytest.mark.parametrize("overrides", [[], ["adapter.rslora=true"], ["adapter.dora=true"]], ids=str)
def test_peft_loads_what_is_saved(network, tmp_path: Path, overrides):
    save_adapter(trained(attach(network, lora(*overrides))), tmp_path / "adapter", "base")
    torch.manual_seed(0)
    base = build(load_config(["model=qwen3_tiny"]).model).eval()
    loaded = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    assert torch.equal(logits(loaded), logits(network))
    assert {path.name for path in tmp_path.iterdir()} == {"adapter"}
    assert {path.name for path in (tmp_path / "adapter").iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
    }


@pytest.mark.parametrize("target", ["q_prj", "proj", "lm_head"])
def test_a_target_that_names_no_layer_is_refused_with_those_there_are(network, target):
    with pytest.raises(UserError, match=rf"'{target}'.*down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj"):
        attach(network, lora(f"adapter.targets=[{target}]"))
    assert not is_attached(network)


def test_layers_that_keep_their_weights_transposed_are_merged_too():
    torch.manual_seed(0)
    network = GPT2LMHeadModel(GPT2Config(vocab_size=512, n_positions=64, n_embd=32, n_layer=2, n_head=2)).eval()
    base = logits(network)
    with_adapter = logits(trained(attach(network, lora())))
    assert difference(with_adapter, base) > 0.01
    assert difference(logits(merge(network)), with_adapter) <= 1e-5


@pytest.mark.parametrize("dora", ["false", "true"])
def test_four_bits_under_an_adapter_merge_to_the_fp32_weights_that_they_stand_for(tmp_path: Path, dora):
    if find_spec("bitsandbytes") is None:
        pytest.skip("needs CUDA's bitsandbytes")
    qlora = load_config(["adapter=qlora", "adapter.rank=4", f"adapter.dora={dora}", "trainer=dpo"]).adapter
    assert isinstance(qlora, QLoRAAdapter)
    torch.manual_seed(0)
    build(load_config(["model=qwen3_tiny", "model.intermediate_size=192"]).model).save_pretrained(tmp_path / "base")
    network = directory.load_in_4bit(tmp_path / "base", qlora, torch.float32)
    network.train()  # in evaluation, bitsandbytes packs the weights anew for CPUs
    base = network(input_ids=IDS).logits
    plain = sum(p.numel() for p in directory.load(tmp_path / "base").parameters())
    assert parameter_counts(network)[1] == plain
    trained(attach(network, qlora)).train()
    assert {p.dtype for p in network.parameters() if p.requires_grad} == {torch.float32}
    with adapter_off(network):
        assert torch.equal(network(input_ids=IDS).logits, base)
    with_adapter = network(input_ids=IDS).logits
    merge(network)
    assert difference(network(input_ids=IDS).logits, with_adapter) <= 1e-5  # 6e-7 was seen
    network.save_pretrained(tmp_path / "merged")
    assert torch.equal(logits(directory.load(tmp_path / "merged")), logits(network))
