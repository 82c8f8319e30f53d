"""Packed rows equal their sequences run alone, under each kernel; what is masked is never computed."""

import numpy as np
import pytest
import torch
from networks import SHAPES, SIZES, qwen3, some_trees
from torch.nn.attention.flex_attention import create_mask, flex_attention
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.flop_counter import FlopCounterMode
from transformers import MistralConfig, MistralForCausalLM

from llmtrain.errors import UnsupportedModel
from llmtrain.models import attention
from llmtrain.models.attention import block_mask, by_shape, dense_mask, generating, kernel_of, segment_attention, use
from llmtrain.models.block_attention import block_attention, compiled_block_attention, numbers_of
from llmtrain.models.logprobs import check_log_probs, hidden_states
from llmtrain.models.packed import Packed, Tree, document, pack


def alone(model, trees: list[Tree]) -> list[torch.Tensor]:
    """The hidden states that `hidden_states` should give, from one plain forward pass for each answer."""
    found = []
    for tree in trees:
        for answer in tree.answers:
            ids = torch.from_numpy(np.concatenate([tree.prompt, answer.ids]))
            hidden = model.base_model(input_ids=ids[None], use_cache=False).last_hidden_state[0]
            places = np.flatnonzero(answer.is_target) + len(tree.prompt) - 1
            found.append(hidden[places[places >= 0]])
    return found


@pytest.mark.parametrize("pad_to", [1, 128])
@pytest.mark.parametrize("kernel", ["segments", "compiled_segments", "sdpa"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-7)])  # norms round to fp32
def test_hidden_states_and_gradients_are_those_of_each_sequence_alone(kernel, dtype, tolerance, pad_to):
    model, trees = qwen3(max_position_embeddings=256).to(dtype), some_trees()
    expected = torch.cat(alone(model, trees))
    directions = torch.randn(expected.shape, dtype=dtype)
    (expected * directions).sum().backward()
    gradients = {name: parameter.grad.clone() for name, parameter in model.base_model.named_parameters()}
    model.zero_grad()

    use(model, kernel)
    found = hidden_states(model, pack(trees, pad_to))
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
    (found * directions).sum().backward()
    for name, parameter in model.base_model.named_parameters():
        assert (parameter.grad - gradients[name]).norm() <= 10 * tolerance * gradients[name].norm(), name


def test_each_shape_of_segment_is_one_call(monkeypatch):
    calls = []

    def counted(query, *others, **named):
        calls.append((len(query), query.shape[2]))
        return scaled_dot_product_attention(query, *others, **named)

    monkeypatch.setattr(attention, "scaled_dot_product_attention", counted)
    model, packed = qwen3(num_hidden_layers=1).bfloat16(), pack(some_trees())
    use(model, "segments")
    hidden_states(model, packed)
    shapes = by_shape(numbers_of(packed.segments))
    assert sorted(calls) == sorted((len(members), length) for (length, _), members in shapes.items())
    assert (2, 8) in calls, "the two documents of nine tokens go together"
    assert (2, 4) in calls, "and so do the two rejected answers of five tokens with prompts of four"
    assert sum(count * length for count, length in calls) == packed.num_tokens


def test_under_autocast_a_cpu_attends_in_fp32(monkeypatch):
    """oneDNN would make code for the shape of each product of SDPA's in bf16, and keep it."""
    monkeypatch.delattr(attention, "scaled_dot_product_attention")
    query, key, value = (torch.randn(1, 2, 40, 8, dtype=torch.bfloat16).requires_grad_() for _ in range(3))
    segments = [0, 30, 0, 0, 30, 40, 0, 9]
    found = {}
    for name, autocast in (("autocast", True), ("fp32", False)):
        inputs = [t if autocast else t.detach().float().requires_grad_() for t in (query, key, value)]
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            attended, _ = segment_attention(torch.nn.Identity(), *inputs, None, segments=segments)
        assert attended.dtype == torch.float32
        found[name] = [attended, *torch.autograd.grad(attended.square().sum(), inputs)]
    assert torch.equal(found["autocast"][0], found["fp32"][0])
    for ours, exact in zip(found["autocast"][1:], found["fp32"][1:], strict=True):
        assert ours.dtype == torch.bfloat16
        assert torch.equal(ours, exact.bfloat16())


def test_dropout_is_drawn_within_segments_too():
    model, packed = qwen3(attention_dropout=0.5).train(), pack(some_trees())
    use(model, "segments")
    with torch.no_grad():
        assert not torch.equal(hidden_states(model, packed), hidden_states(model, packed))


def rows() -> dict[str, Packed]:
    random = np.random.default_rng(1)
    long = [document(random.integers(97, size=size)) for size in (300, 5, 130, 2, 260)]
    return {"trees": pack(some_trees()), "padded": pack(some_trees(), pad_to=256), "long documents": pack(long)}


@pytest.mark.parametrize("row", rows())
def test_the_block_mask_is_the_dense_mask(row):
    packed = rows()[row]
    dense, blocks = dense_mask(packed), block_mask(packed)
    size = packed.num_tokens
    assert torch.equal(create_mask(blocks.mask_mod, None, None, size, size, device="cpu")[0, 0], dense)
    padded = torch.zeros(*(-(-size // edge) * edge for edge in blocks.BLOCK_SIZE), dtype=torch.bool)
    padded[:size, :size] = dense
    tiles = padded.unflatten(1, (-1, blocks.BLOCK_SIZE[1])).unflatten(0, (-1, blocks.BLOCK_SIZE[0])).transpose(1, 2)
    assert torch.equal(blocks.to_dense()[0, 0].bool(), tiles.any(dim=(2, 3))), "what is masked whole is skipped"


@pytest.mark.filterwarnings("ignore:flex_attention called without")
def test_flex_attention_computes_what_sdpa_does_under_the_dense_mask():
    """Uncompiled, forward only: all that a CPU can do of it."""
    packed = pack(some_trees())
    query, key, value = torch.randn(3, 1, 4, packed.num_tokens, 8, dtype=torch.float64).unbind()
    expected = scaled_dot_product_attention(query, key, value, attn_mask=dense_mask(packed))
    found = flex_attention(query, key, value, block_mask=block_mask(packed))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("kernel", ["segments", "flex"])
def test_kernels_agree_on_cuda(kernel):
    model, found = qwen3(head_dim=16, max_position_embeddings=512).cuda(), {}
    packed = rows()["long documents"].to("cuda")
    for chosen in ("sdpa", kernel):
        use(model, chosen)
        model.zero_grad()
        hidden = hidden_states(model, packed)
        hidden.square().sum().backward()
        found[chosen] = [hidden.detach(), *(parameter.grad for parameter in model.base_model.parameters())]
    for ours, theirs in zip(found[kernel], found["sdpa"], strict=True):
        assert (ours - theirs).norm() <= 2e-3 * theirs.norm()  # products may be in TF32


def test_rows_that_are_not_packed_run_as_ever_under_each_kernel():
    model = qwen3().eval()
    ids, mask = torch.randint(97, (3, 12)), torch.ones(3, 12, dtype=torch.int64)
    mask[0, :5] = 0
    with torch.no_grad():
        expected = model(input_ids=ids, attention_mask=mask).logits
        use(model, "segments")
        assert torch.equal(model(input_ids=ids, attention_mask=mask).logits[1:], expected[1:])
        assert torch.equal(model(input_ids=ids, attention_mask=mask).logits[0, 5:], expected[0, 5:])


@pytest.mark.parametrize("kernel", ["segments", "sdpa", "flex"])
def test_generating_is_transformers_own_and_the_kernel_comes_back(kernel):
    model = qwen3()
    use(model, kernel)
    with pytest.raises(KeyError), generating(model):  # noqa: PT012
        assert model.config._attn_implementation == "sdpa"
        raise KeyError
    assert kernel_of(model) == kernel


@pytest.mark.parametrize("kernel", ["segments", "sdpa", "flex"])
@pytest.mark.parametrize("window", [8, 4096])
def test_sliding_windows_are_refused_under_each_kernel(kernel, window):
    model = MistralForCausalLM(MistralConfig(**SIZES, sliding_window=window))
    use(model, kernel)
    with pytest.raises(UnsupportedModel, match="sliding"):
        check_log_probs(model)


def test_layers_that_ask_for_what_blocks_do_not_know_are_refused():
    packed = torch.zeros(1, 2, 4, 8)
    with pytest.raises(UnsupportedModel, match="s_aux"):
        segment_attention(torch.nn.Identity(), packed, packed, packed, None, segments=[0, 4, 0, 0], s_aux=packed)


def test_the_shapes_are_what_the_tests_above_need():
    assert len(some_trees()) == len(SHAPES)
    assert {len(shape) for shape in SHAPES} == {2, 3, 4}


@pytest.mark.parametrize("segments", [
    [(0, 7, 0, 0)],
    [(0, 70, 0, 0), (70, 71, 70, 70), (71, 200, 71, 71)],
    [(0, 90, 0, 0), (90, 390, 0, 30), (390, 393, 390, 390), (393, 395, 390, 391)],
])  # fmt: skip
@pytest.mark.parametrize("groups", [(4, 4), (4, 2), (6, 1)])
def test_block_attention_is_sdpa_under_the_dense_mask_with_its_gradients(segments, groups):
    heads, key_heads = groups
    tokens = segments[-1][1]
    packed = pack([document(np.zeros(tokens + 1, dtype=np.int64))])
    packed.segments = torch.tensor(segments)
    made = [torch.randn(1, tokens, n, 8, dtype=torch.float64) for n in (heads, key_heads, key_heads)]
    query, key, value = (t.transpose(1, 2).requires_grad_() for t in made)
    repeated = [t.repeat_interleave(heads // key_heads, dim=1) for t in (key, value)]
    expected = scaled_dot_product_attention(query, *repeated, attn_mask=dense_mask(packed)).transpose(1, 2)
    found = block_attention(query, key, value, numbers_of(packed.segments), 8**-0.5)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    upstream = torch.randn_like(found)
    ours, theirs = (torch.autograd.grad(t, (query, key, value), upstream) for t in (found, expected))
    for our, their in zip(ours, theirs, strict=True):
        torch.testing.assert_close(our, their, rtol=1e-11, atol=1e-11)


def test_block_attention_is_an_operator_that_torch_can_trace():
    query = torch.randn(1, 4, 80, 8, dtype=torch.float64, requires_grad=True)
    key, value = (torch.randn(1, 2, 80, 8, dtype=torch.float64, requires_grad=True) for _ in range(2))
    torch.library.opcheck(block_attention, (query, key, value, [0, 70, 0, 0, 70, 80, 0, 9], 0.3))
    torch.library.opcheck(
        compiled_block_attention, (query, key, value, torch.tensor([[0, 70, 0, 0], [70, 80, 0, 9]]), 0.3)
    )
    with FlopCounterMode(display=False) as counter:
        block_attention(query, key, value, [0, 70, 0, 0, 70, 80, 0, 9], 0.3).sum().backward()
    pairs = 70 * 70 + 10 * 19
    assert counter.get_total_flops() == 7 * 2 * 4 * 8 * pairs


def test_dropout_of_a_compiled_network_is_sdpas_under_the_dense_mask():
    packed = pack(some_trees())
    query, key, value = (torch.randn(1, 2, packed.num_tokens, 8) for _ in range(3))
    torch.manual_seed(0)
    found, _ = attention.compiled_segment_attention(
        torch.nn.Identity(), query, key, value, None, segments=packed.segments, dropout=0.5
    )
    torch.manual_seed(0)
    expected = scaled_dot_product_attention(query, key, value, attn_mask=dense_mask(packed), dropout_p=0.5)
    torch.testing.assert_close(found, expected.transpose(1, 2))
