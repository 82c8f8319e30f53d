"""Rounding to integers: a grid by hand, the nearest numbers, and GPTQ's smaller error of the outputs."""

import torch
from transformers import AutoModelForCausalLM

from llmtrain.optimise.gptq import Blocks, gptq, nearest, quantise


def test_a_block_whose_weights_lie_on_a_grid_is_kept_exactly():
    weights = torch.tensor([[-0.4, -0.1, 0.0, 0.3, 0.8, 1.1, 0.2, -0.2]])  # steps of 0.1, 16 of them from -0.4 to 1.1
    blocks = nearest(weights, bits=4, block_size=8)
    assert torch.allclose(blocks.scales, torch.tensor([[0.1]]))
    assert blocks.zeros.tolist() == [[4]]
    assert blocks.integers.tolist() == [[0, 3, 4, 7, 12, 15, 6, 2]]
    assert torch.allclose(blocks.weights, weights, atol=1e-6)


def test_weights_are_scale_times_what_the_integer_is_above_zero():
    blocks = Blocks(torch.tensor([[0, 9, 3, 15]], dtype=torch.uint8), torch.tensor([[0.5, 2.0]]),
                    torch.tensor([[1, 5]], dtype=torch.uint8))  # fmt: skip
    assert blocks.weights.tolist() == [[-0.5, 4.0, -4.0, 20.0]]


def test_zero_stays_zero_in_a_block_of_one_sign():
    blocks = nearest(torch.tensor([[0.0, 3.0, 4.0, 5.0]]), bits=8, block_size=4)
    assert blocks.weights[0, 0] == 0


def test_eight_bits_are_at_most_half_a_step_off():
    weights = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
    blocks = nearest(weights, bits=8, block_size=32)
    span = weights.view(5, 2, 32).amax(2) - weights.view(5, 2, 32).amin(2)
    assert torch.allclose(blocks.scales, span / 255)
    off = (blocks.weights - weights).abs().view(5, 2, 32) / blocks.scales[..., None]
    inside = (blocks.integers > 0) & (blocks.integers < 255)  # the zero is rounded too, which shifts the ends
    assert off.view(5, 64)[inside].max() <= 0.5 + 1e-3
    assert off.max() <= 1 + 1e-3


def test_gptq_errs_less_in_the_outputs_than_nearest_where_inputs_hang_together():
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(48, 64, generator=generator)
    inputs = torch.randn(400, 8, generator=generator) @ torch.randn(8, 64, generator=generator)
    inputs += 0.1 * torch.randn(400, 64, generator=generator)

    def error(blocks: Blocks) -> float:
        return float((inputs @ (blocks.weights - weights).T).square().mean())

    assert error(gptq(weights, inputs.T @ inputs, 4, 32)) < 0.3 * error(nearest(weights, 4, 32))


def test_gptq_is_nearest_where_inputs_have_nothing_in_common():
    weights = torch.randn(7, 64, generator=torch.Generator().manual_seed(1))
    found, expected = gptq(weights, torch.eye(64), 4, 32), nearest(weights, 4, 32)
    assert torch.equal(found.integers, expected.integers)


def test_gptq_takes_inputs_that_are_always_zero():
    moments = torch.eye(32)
    moments[3, 3] = 0
    assert torch.isfinite(gptq(torch.ones(2, 32), moments, 4, 32).weights).all()


def test_a_model_is_left_with_the_weights_that_its_integers_give(sources):
    model = AutoModelForCausalLM.from_pretrained(sources("tied")).eval()
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    said: list[str] = []
    found = quantise(model, [torch.arange(3, 100), torch.arange(50, 250)], 4, 32, said.append)
    now = dict(model.named_parameters())
    assert len(found) == 2 * 7
    assert all(torch.equal(now[f"{name}.weight"], blocks.weights) for name, blocks in found.items())
    untouched = [name for name in before if name.removesuffix(".weight") not in found]
    assert all(torch.equal(now[name], before[name]) for name in untouched)
    assert said == ["rounded block 1 of 2", "rounded block 2 of 2"]
