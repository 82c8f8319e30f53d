"""Log-probabilities of given tokens, in chunks: the [tokens, vocabulary] tensor of logits never exists.

Of 16 rows of 1,024 tokens over Qwen3's 151,936 entries the fp32 logits alone would take 10 GB; a chunk of 1,024 tokens
takes 0.6 GB. For training, llmtrain.models.head turns a chunk into its gradients as well.
"""

from itertools import pairwise

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from llmtrain.errors import UnsupportedModel
from llmtrain.models.attention import generating, kernel_of, mask_arguments
from llmtrain.models.logit_kernels import log_probs
from llmtrain.models.packed import Packed, document, pack


def hidden_states(model: PreTrainedModel, packed: Packed) -> Tensor:
    """[targets, width]: the hidden states, after the last norm, that predict the targets of a packed row."""
    hidden: Tensor = model.base_model(
        input_ids=packed.ids[None],
        position_ids=packed.positions[None],
        use_cache=False,
        **mask_arguments(kernel_of(model), packed),
    ).last_hidden_state
    return hidden[0].index_select(0, packed.predictors)


@torch.no_grad()
def token_log_probs(hidden: Tensor, output: nn.Linear, targets: Tensor, chunk_tokens: int) -> Tensor:
    """ln p(target | hidden) for each target, fp32, or fp64 for an fp64 `hidden`; without gradients.

    hidden [targets, width], targets [targets] -> [targets]; `output` without bias. At most `chunk_tokens` rows of
    logits exist at a time.
    """
    hidden, weight = as_autocast(hidden, output.weight)
    num_chunks = max(1, -(-len(hidden) // chunk_tokens))
    parts = hidden.tensor_split(num_chunks)  # of equal size: products of one to three rows lose a digit in fp32
    memory = logits_memory(hidden, rows_filled_up(len(parts[0]), hidden), len(weight))
    found = []
    for part, ids in zip(parts, targets.tensor_split(num_chunks), strict=True):
        rows = filled_up(part)
        logits = torch.mm(rows, weight.T, out=memory[: len(rows)])
        found.append(log_probs(logits[: len(part)], ids))
    return torch.cat(found)


def equal_parts(whole: slice, size: int) -> list[slice]:
    """`whole` in parts of equal size, at most `size`: products of one to three rows lose a digit in fp32."""
    length = whole.stop - whole.start
    count = max(1, -(-length // size))
    bounds = [whole.start + length * number // count for number in range(count + 1)]
    return [slice(*ends) for ends in pairwise(bounds)]


def filled_up(rows: Tensor) -> Tensor:
    """rows [rows, width], with rows of zeros up to `rows_filled_up`."""
    lacking = rows_filled_up(len(rows), rows) - len(rows)
    return torch.cat([rows, rows.new_zeros(lacking, rows.shape[1])]) if lacking else rows


def rows_filled_up(count: int, like: Tensor) -> int:
    """Rows of a product with tensors as `like`: `count`, in bf16 on a CPU the next multiple of `SAME_SHAPE`."""
    return -(-count // SAME_SHAPE) * SAME_SHAPE if like.device.type == "cpu" and like.dtype.itemsize == 2 else count


def as_autocast(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Both in autocast's type where it is on, else in that of `hidden`: a product into given memory is not cast."""
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    return hidden.to(dtype), weight.to(dtype)


SAME_SHAPE = 128
"""Of a product in bf16, oneDNN makes code for each new shape, and keeps it: milliseconds, and a megabyte or two."""
_KEPT: dict[torch.dtype, Tensor] = {}


def logits_memory(like: Tensor, rows: int, columns: int) -> Tensor:
    """[rows, columns] unwritten, of the type of `like` and on its device.

    A CPU process keeps it for the next call: pages that are given back and faulted in again cost a third of a product.
    """
    if like.device.type != "cpu" or type(like) is not Tensor:  # CUDA's allocator keeps it; a traced tensor has none
        return like.new_empty(rows, columns)
    kept = _KEPT.get(like.dtype)
    if kept is None or kept.numel() < rows * columns:
        kept = _KEPT[like.dtype] = like.new_empty(rows * columns)
    return kept[: rows * columns].view(rows, columns)


@torch.no_grad()
def check_log_probs(model: PreTrainedModel, tolerance: float = 1e-4) -> None:
    """Raises UnsupportedModel where log-probabilities of packed rows differ from the model's own logits.

    Compared on two documents in one row, fp32, by the largest absolute difference. Architectures that scale or cap
    their logits, add a bias to them, put something between the last hidden state and the output layer, or look across
    the borders of documents are found here; sliding windows, longer than the two documents, by the config.
    """
    name = type(model).__name__
    output = model.get_output_embeddings()
    if not isinstance(output, nn.Linear) or "bias" in dict(output.named_parameters()):
        raise UnsupportedModel(
            f"{name} has no plain linear output layer; use an architecture that has one, such as Qwen3"
        )
    text = model.config.get_text_config()
    kinds = set(getattr(text, "layer_types", None) or [])
    if kinds - {"full_attention"} or (not kinds and getattr(text, "sliding_window", None)):
        raise UnsupportedModel(
            f"{name} has layers that see a sliding window only ({', '.join(sorted(kinds)) or 'sliding_window'} in its "
            f"config.json), which attention within documents does not know; choose a model with full attention"
        )
    training, vocab_size = model.training, output.weight.shape[0]
    model.eval()
    ids = torch.arange(40) * 7919 % vocab_size
    documents = [ids[:23], ids[23:]]
    packed = pack([document(part.numpy()) for part in documents]).to(output.weight.device)
    ours = token_log_probs(hidden_states(model, packed), output, packed.targets, chunk_tokens=8)
    theirs = []
    with generating(model):
        for part in documents:
            logits = model(input_ids=part[None].to(output.weight.device), use_cache=False).logits[0, :-1].float()
            theirs.append(logits.log_softmax(dim=1).gather(1, part[1:, None].to(logits.device)).squeeze(1))
    model.train(training)
    difference = (ours - torch.cat(theirs)).abs().max().item()
    if not difference <= tolerance:
        raise UnsupportedModel(
            f"{name}: log-probabilities from hidden states differ from the model's own logits by {difference:.1e} "
            f"(at most {tolerance:.0e} is rounding); llmtrain cannot train this architecture"
        )
