"""Log-probabilities of given tokens, in chunks: the [batch, time, vocabulary] tensor of logits never exists.

Of 16 rows of 1,024 tokens over Qwen3's 151,936 entries the fp32 logits alone would take 10 GB, twice in the backward
pass; a chunk of 1,024 tokens takes 0.6 GB and is computed again for its gradient (as in Apple's cut cross-entropy,
arXiv 2411.09009, in plain PyTorch).
"""

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from llmtrain.errors import UnsupportedModel


def hidden_states(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """[batch, time] token ids -> [batch, time, hidden], after the last norm. Rows are padded on the right, if at all:
    under causal attention no token sees what follows it, so padding needs no mask."""
    hidden: Tensor = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
    return hidden


def at_least_fp32(dtype: torch.dtype) -> torch.dtype:
    """The precision of log-probabilities: that of the logits, and fp32 for a lower one."""
    return torch.promote_types(dtype, torch.float32)


def token_log_probs(hidden: Tensor, output: nn.Linear, targets: Tensor, chunk_tokens: int) -> Tensor:
    """ln p(target | hidden) for each token, fp32, or fp64 for an fp64 `hidden`.

    hidden [n, hidden], targets [n] -> [n]. Differentiable in `hidden` and in the output layer's weight; at most
    `chunk_tokens` rows of logits exist at a time, in the forward and in the backward pass.
    """
    num_chunks = max(1, -(-len(hidden) // chunk_tokens))
    chunks = [  # of equal size: products of one to three rows with a large vocabulary lose a digit in fp32
        checkpoint(_chunk_log_probs, part, output.weight, ids, use_reentrant=False, preserve_rng_state=False)
        for part, ids in zip(hidden.tensor_split(num_chunks), targets.tensor_split(num_chunks), strict=True)
    ]
    return torch.cat(chunks)


def _chunk_log_probs(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    logits = hidden @ weight.T
    logits = logits.to(at_least_fp32(logits.dtype))
    return logits.gather(1, targets[:, None]).squeeze(1) - logits.logsumexp(dim=1)


@torch.no_grad()
def check_log_probs(model: PreTrainedModel, tolerance: float = 1e-4) -> None:
    """Raises UnsupportedModel where the chunked log-probabilities differ from the model's own logits.

    Compared on one row, fp32, by the largest absolute difference. Architectures that scale or cap their logits, add a
    bias to them, or put something between the last hidden state and the output layer are found here.
    """
    name = type(model).__name__
    output = model.get_output_embeddings()
    if not isinstance(output, nn.Linear) or "bias" in dict(output.named_parameters()):
        raise UnsupportedModel(
            f"{name} has no plain linear output layer; use an architecture that has one, such as Qwen3"
        )
    training, vocab_size = model.training, output.weight.shape[0]
    model.eval()
    ids = (torch.arange(33, device=output.weight.device) * 7919 % vocab_size)[None]
    ours = token_log_probs(hidden_states(model, ids)[0, :-1], output, ids[0, 1:], chunk_tokens=8)
    logits = model(input_ids=ids, use_cache=False).logits[0, :-1].float()
    theirs = logits.log_softmax(dim=1).gather(1, ids[0, 1:, None]).squeeze(1)
    model.train(training)
    difference = (ours - theirs).abs().max().item()
    if not difference <= tolerance:
        raise UnsupportedModel(
            f"{name}: log-probabilities from hidden states differ from the model's own logits by {difference:.1e} "
            f"(at most {tolerance:.0e} is rounding); llmtrain cannot train this architecture"
        )
