"""The shapes are the published ones: parameter counts from their model cards."""

import pytest
import torch

from llmtrain.config.compose import load_config
from llmtrain.config.model import Qwen3Model
from llmtrain.models.build import build, parameter_counts, shape_sha256


def model(option: str, *overrides: str) -> Qwen3Model:
    return load_config([f"model={option}", *overrides]).model


@pytest.mark.parametrize(
    ("option", "billions", "billions_without_embeddings", "layers", "query_heads"),
    [
        ("qwen3_0_6b", 0.6, 0.44, 28, 16),
        ("qwen3_1_7b", 1.7, 1.4, 28, 16),
        ("qwen3_4b", 4.0, 3.6, 36, 32),
        ("qwen3_8b", 8.2, 6.95, 36, 32),
        ("qwen3_14b", 14.8, 13.2, 40, 40),
        ("qwen3_32b", 32.8, 31.2, 64, 64),
    ],
)
def test_published_shapes_have_their_published_counts(
    option, billions, billions_without_embeddings, layers, query_heads
):
    shape = model(option)
    total, without_embeddings = parameter_counts(shape)
    assert total / 1e9 == pytest.approx(billions, abs=0.05)
    assert without_embeddings / 1e9 == pytest.approx(billions_without_embeddings, abs=0.05)
    assert (shape.num_hidden_layers, shape.num_attention_heads, shape.num_key_value_heads) == (layers, query_heads, 8)


def test_counts_by_hand():
    # embedding 512 * 64, counted once (tied); a block: q, o 64 * 64 each, k, v 64 * 32 each, feed-forward 3 * 64 * 160,
    # norms 64 + 64 and per head 16 + 16; one norm of 64 at the end
    block = 2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 160 + 2 * 64 + 2 * 16
    assert parameter_counts(model("qwen3_tiny")) == (512 * 64 + 2 * block + 64, 2 * block + 64)


def test_small_is_about_two_point_four_million_and_tiny_well_below_one():
    assert parameter_counts(model("qwen3_small"))[0] == pytest.approx(2.4e6, rel=0.03)
    assert parameter_counts(model("qwen3_tiny"))[0] < 2e5


def test_equal_seeds_give_equal_weights():
    networks = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        networks.append(build(model("qwen3_tiny")).model.embed_tokens.weight)
    assert torch.equal(networks[0], networks[1])
    assert not torch.equal(networks[0], networks[2])


def test_the_shape_hash_ignores_what_does_not_decide_which_weights_fit():
    shape = shape_sha256(model("qwen3_tiny"))
    assert shape == shape_sha256(model("qwen3_tiny", "model.attention_dropout=0.1", "model.name=other"))
    assert shape != shape_sha256(model("qwen3_tiny", "model.rope_theta=5e5"))
    assert shape != shape_sha256(model("qwen3_tiny", "model.hidden_size=128"))
