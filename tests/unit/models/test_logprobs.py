"""Chunked log-probabilities against transformers' own logits and loss."""

import pytest
import torch
from torch import nn
from transformers import Gemma2Config, Gemma2ForCausalLM, LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from llmtrain.errors import UnsupportedModel
from llmtrain.models.logprobs import check_log_probs, hidden_states, token_log_probs

SIZES = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
}


def qwen3(**changes) -> Qwen3ForCausalLM:
    torch.manual_seed(0)
    return Qwen3ForCausalLM(Qwen3Config(**SIZES | changes))


@pytest.mark.parametrize("chunk_tokens", [1, 5, 30, 1000])
def test_loss_and_gradients_equal_transformers_own_whatever_the_chunk(chunk_tokens):
    model = qwen3(tie_word_embeddings=True).double()
    ids = torch.randint(97, (2, 16))
    model(input_ids=ids, labels=ids).loss.backward()
    expected = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    expected_loss = model(input_ids=ids, labels=ids).loss.item()
    model.zero_grad()

    hidden = hidden_states(model, ids)[:, :-1].flatten(0, 1)
    log_probs = token_log_probs(hidden, model.lm_head, ids[:, 1:].flatten(), chunk_tokens)
    loss = -log_probs.mean()
    loss.backward()
    assert loss.item() == pytest.approx(expected_loss, rel=1e-6)  # transformers rounds the logits to fp32
    for name, parameter in model.named_parameters():
        difference = (parameter.grad - expected[name]).norm() / expected[name].norm()
        assert difference < 1e-5, name


def test_no_more_than_a_chunk_of_logits_exists():
    """The largest tensor that the loss allocates has chunk * vocabulary elements, forward and backward."""
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            out = function(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                largest = max(largest, out.numel())
            return out

    vocabulary, chunk, tokens = 1000, 8, 512
    hidden = torch.randn(tokens, 16, requires_grad=True)
    output = nn.Linear(16, vocabulary, bias=False)
    with Watch():
        token_log_probs(hidden, output, torch.randint(vocabulary, (tokens,)), chunk).sum().backward()
    assert largest == max(chunk * vocabulary, vocabulary * 16)
    assert largest < tokens * vocabulary / 10


def test_no_targets_give_no_log_probs():
    output = nn.Linear(4, 9, bias=False)
    assert token_log_probs(torch.zeros(0, 4), output, torch.zeros(0, dtype=torch.int64), 8).shape == (0,)


def test_padding_on_the_right_changes_nothing():
    model = qwen3().eval()
    ids = torch.randint(97, (1, 9))
    padded = torch.cat([ids, torch.zeros(1, 5, dtype=torch.int64)], dim=1)
    with torch.no_grad():
        assert torch.allclose(hidden_states(model, ids), hidden_states(model, padded)[:, :9], atol=1e-6)


def test_qwen3_and_llama_pass_the_check():
    check_log_probs(qwen3())
    check_log_probs(LlamaForCausalLM(LlamaConfig(**SIZES)))


def test_a_model_that_caps_its_logits_is_refused_by_name():
    model = Gemma2ForCausalLM(Gemma2Config(**SIZES, final_logit_softcapping=0.5, pad_token_id=0))
    with torch.no_grad():
        model.lm_head.weight.mul_(20)
    with pytest.raises(UnsupportedModel, match="Gemma2ForCausalLM"):
        check_log_probs(model)


def test_a_model_with_a_bias_in_its_output_layer_is_refused():
    model = qwen3()
    model.lm_head = nn.Linear(32, 97, bias=True)
    with pytest.raises(UnsupportedModel, match="Qwen3ForCausalLM"):
        check_log_probs(model)


def test_the_check_leaves_the_model_in_training_mode():
    model = qwen3().train()
    check_log_probs(model)
    assert model.training
