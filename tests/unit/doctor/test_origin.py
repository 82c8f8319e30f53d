"""Where a number is lost, in a tiny network: in a module, between modules, in the loss, on the way back."""

import numpy as np
import pytest
import torch
from torch import nn

from llmtrain.config.compose import load_config
from llmtrain.models import attention
from llmtrain.models.build import build
from llmtrain.models.head import loss_of_tokens
from llmtrain.models.logprobs import hidden_states
from llmtrain.models.packed import document, pack
from llmtrain.training.batches import MicroBatch
from llmtrain.training.origin import Origin, find_origin


@pytest.fixture
def model():
    torch.manual_seed(0)
    network = build(load_config(["model=qwen3_tiny"]).model)
    attention.use(network, "segments")
    return network


def micro_batch(first: int) -> MicroBatch:
    """Two rows, of 5 and 7 tokens: 4 and 6 pass through the model."""
    rows = [document(np.arange(first, first + length)) for length in (5, 7)]
    nothing = torch.zeros(0)
    return MicroBatch(
        pack(rows), indices=torch.tensor([first, first + 1]), reference=nothing, is_desirable=nothing.bool()
    )


def origin_of(model) -> Origin | None:
    def loss(batch: MicroBatch) -> torch.Tensor:
        hidden, weight = hidden_states(model, batch.packed), model.get_output_embeddings().weight
        return loss_of_tokens(hidden, weight, batch.packed.targets, 1 / 20, chunk_tokens=8)

    return find_origin(model, [micro_batch(10), micro_batch(30)], loss, backward=True)


def test_a_sound_network_has_no_origin_and_no_gradient_is_left(model):
    assert origin_of(model) is None
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_hooks or module._backward_hooks for module in model.modules())


def test_a_token_that_is_not_finite_is_found_in_its_micro_batch_at_its_place(model):
    model.config.tie_word_embeddings = False
    model.lm_head = nn.Linear(64, 512, bias=False)
    model.get_input_embeddings().weight.data[33] = torch.inf
    found = origin_of(model)
    assert found is not None
    assert (found.micro_batch, found.direction, found.layer, found.weight) == (
        2,
        "forward",
        "model.embed_tokens",
        "weight",
    )
    assert (found.rows, found.token) == ((30, 31), 3), "of 30 31 32 33 | 30 31 ...: the first 33"


def test_a_weight_is_found_with_the_largest_number_that_went_in(model):
    norm = model.get_submodule("model.layers.1.self_attn.k_norm")
    seen = []
    norm.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0].abs().max().item()))
    norm.weight.data[0] = torch.nan
    found = origin_of(model)
    assert found is not None
    assert (found.micro_batch, found.layer, found.weight) == (1, "model.layers.1.self_attn.k_norm", "weight")
    assert found.largest_input == pytest.approx(seen[0])
    assert found.token is None, "all tokens are lost at once"


def test_what_is_lost_between_modules_is_laid_to_the_module_around_them(model):
    projection = model.get_submodule("model.layers.0.self_attn.o_proj")
    projection.register_forward_pre_hook(lambda module, inputs: (inputs[0] * torch.inf,))
    found = origin_of(model)
    assert found is not None
    assert (found.layer, found.weight) == ("model.layers.0.self_attn", None)


def test_an_output_layer_that_overflows_is_the_loss(model):
    model.config.tie_word_embeddings = False
    model.lm_head = nn.Linear(64, 512, bias=False)
    model.lm_head.weight.data[400, 0] = torch.inf
    found = origin_of(model)
    assert found is not None
    assert (found.direction, found.layer, found.weight) == ("forward", "loss", "weight")


class LostOnTheWayBack(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, upstream):
        return upstream * torch.nan


def test_a_gradient_is_found_in_its_module_or_between_two(model):
    layer = model.get_submodule("model.layers.1.mlp.gate_proj")
    forward = layer.forward
    layer.forward = lambda x: LostOnTheWayBack.apply(forward(x))
    found = origin_of(model)
    assert found is not None
    assert (found.direction, found.layer) == ("backward", "model.layers.1.mlp.gate_proj")
    layer.forward = forward
    down = model.get_submodule("model.layers.1.mlp.down_proj")
    down.register_forward_pre_hook(lambda module, inputs: (LostOnTheWayBack.apply(inputs[0]),))
    found = origin_of(model)
    assert found is not None
    assert found.direction == "backward"
    assert found.layer.startswith("model.layers.1.mlp")
