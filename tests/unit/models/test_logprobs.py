"""Chunked log-probabilities against transformers' own logits; which architectures pass."""

import numpy as np
import pytest
import torch
from networks import SIZES, qwen3
from torch import nn
from transformers import Gemma2Config, Gemma2ForCausalLM, LlamaConfig, LlamaForCausalLM

from llmtrain.errors import UnsupportedModel
from llmtrain.models import logprobs
from llmtrain.models.attention import use
from llmtrain.models.logprobs import check_log_probs, hidden_states, token_log_probs
from llmtrain.models.packed import document, pack


@pytest.mark.parametrize("kernel", ["segments", "sdpa"])
@pytest.mark.parametrize("chunk_tokens", [1, 5, 30, 1000])
@torch.no_grad()
def test_log_probabilities_equal_transformers_own_whatever_the_chunk(chunk_tokens, kernel):
    model = qwen3(tie_word_embeddings=True).double()
    documents = [torch.randint(97, (length,)) for length in (16, 2, 9)]
    theirs = [model(input_ids=ids[None]).logits[0, :-1].log_softmax(1) for ids in documents]
    expected = [all_of.gather(1, ids[1:, None]).squeeze(1) for all_of, ids in zip(theirs, documents, strict=True)]
    use(model, kernel)
    packed = pack([document(ids.numpy()) for ids in documents])
    found = token_log_probs(hidden_states(model, packed), model.lm_head, packed.targets, chunk_tokens)
    torch.testing.assert_close(found, torch.cat(expected), rtol=1e-7, atol=1e-7)  # Qwen3's norms round to fp32


@torch.no_grad()
def test_no_more_than_a_chunk_of_logits_exists():
    """The largest tensor that is allocated has chunk * vocabulary elements."""
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            out = function(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                largest = max(largest, out.numel())
            return out

    vocabulary, chunk, tokens = 1000, 8, 512
    hidden, output = torch.randn(tokens, 16), nn.Linear(16, vocabulary, bias=False)
    with Watch():
        token_log_probs(hidden, output, torch.randint(vocabulary, (tokens,)), chunk)
    assert largest == max(chunk * vocabulary, vocabulary * 16)
    assert largest < tokens * vocabulary / 10


def test_no_targets_give_no_log_probs():
    output = nn.Linear(4, 9, bias=False)
    assert token_log_probs(torch.zeros(0, 4), output, torch.zeros(0, dtype=torch.int64), 8).shape == (0,)


@pytest.mark.parametrize("kernel", ["segments", "sdpa"])
@torch.no_grad()
def test_padding_changes_nothing(kernel):
    model, tree = qwen3().eval(), document(np.arange(9))
    use(model, kernel)
    plain, padded = (hidden_states(model, pack([tree], pad_to)) for pad_to in (1, 50))
    torch.testing.assert_close(plain, padded, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kernel", ["segments", "sdpa"])
def test_qwen3_and_llama_pass_the_check(kernel):
    for model in (qwen3(), LlamaForCausalLM(LlamaConfig(**SIZES))):
        use(model, kernel)
        check_log_probs(model)


def test_attention_that_crosses_the_border_of_a_document_is_found(monkeypatch):
    model, causal = qwen3(), torch.ones(1, 1, 38, 38, dtype=torch.bool).tril()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)  # fresh weights are near to saying nothing
    monkeypatch.setattr(logprobs, "mask_arguments", lambda kernel, packed: {"attention_mask": causal})
    with pytest.raises(UnsupportedModel, match="differ from the model's own logits"):
        check_log_probs(model)


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
