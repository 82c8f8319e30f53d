"""Linear layers by oneDNN compute what PyTorch's own do, and take over only where they should."""

import copy

import pytest
import torch
from torch import nn

from llmtrain.models import products


@pytest.fixture(autouse=True)
def any_processor_and_size(monkeypatch):
    monkeypatch.setattr(products, "_is_amd", lambda: True)
    monkeypatch.setattr(products, "WORTH_IT", 0)


@pytest.mark.parametrize("shape", [(37, 24), (1, 37, 24), (3, 5, 24)])
def test_output_and_gradients_equal_pytorchs(shape):
    torch.manual_seed(0)
    plain = nn.Linear(24, 40, bias=False)
    ours = copy.deepcopy(plain)
    products.use_onednn(ours)
    x = torch.randn(shape)
    found = []
    for layer in (plain, ours):
        of_x = x.clone().requires_grad_()
        y = layer(of_x)
        y.sin().sum().backward()
        found.append((y.detach(), of_x.grad, layer.weight.grad))
    for expected, actual in zip(*found, strict=True):
        assert ((actual - expected).norm() / expected.norm()).item() <= 1e-6


@pytest.mark.parametrize(
    "layer", [nn.Linear(24, 40), nn.Linear(24, 40, bias=False).double()], ids=["with a bias", "fp64"]
)
def test_other_layers_stay_with_pytorch(layer, monkeypatch):
    monkeypatch.setattr(products._Linear, "apply", pytest.fail)
    x = torch.randn(7, 24, dtype=layer.weight.dtype)
    expected = layer(x)
    products.use_onednn(layer)
    assert torch.equal(layer(x), expected)


def test_a_small_product_stays_with_pytorch(monkeypatch):
    monkeypatch.setattr(products, "WORTH_IT", 7 * 24 * 40 + 1)
    monkeypatch.setattr(products._Linear, "apply", pytest.fail)
    layer = nn.Linear(24, 40, bias=False)
    products.use_onednn(layer)
    assert layer(torch.randn(7, 24)).shape == (7, 40)


def test_names_weights_and_copies_are_those_of_a_plain_layer():
    layer = nn.Sequential(nn.Linear(24, 40, bias=False))
    names = list(layer.state_dict())
    products.use_onednn(layer)
    assert list(layer.state_dict()) == names
    twin = copy.deepcopy(layer)
    nn.init.zeros_(layer[0].weight)
    assert twin(torch.ones(1, 24)).abs().sum() > 0  # the copy multiplies by its own weights
