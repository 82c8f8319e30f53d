"""How many floating-point operations a step needs, in matrix products and attention: what no implementation can avoid.

A product with a matrix of P entries takes 2 P operations a token forwards and 4 P backwards. Attention of a token that
sees n others takes 4 n * heads * head_dim forwards and twice that backwards (causal: masked entries are not counted).
"""

import time
from collections.abc import Iterable, Sequence


def block_parameters(shape: dict[str, int]) -> int:
    """Entries of all matrices inside the blocks."""
    width, head = shape["hidden_size"], shape["head_dim"]
    heads = 2 * shape["num_attention_heads"] + 2 * shape["num_key_value_heads"]  # queries, output; keys, values
    return shape["num_hidden_layers"] * width * (heads * head + 3 * shape["intermediate_size"])


def body_flops(shape: dict[str, int], length: int, context: int = 0) -> int:
    """Forwards and backwards through the blocks, of `length` tokens that see each other causally and `context` more."""
    seen = length * (length + 1) // 2 + length * context
    attention = 12 * seen * shape["num_attention_heads"] * shape["head_dim"] * shape["num_hidden_layers"]
    return 6 * block_parameters(shape) * length + attention


def head_flops(shape: dict[str, int], targets: int) -> int:
    """Three matrix products with the output layer for each target."""
    return 6 * shape["hidden_size"] * shape["vocab_size"] * targets


def dpo_flops(shape: dict[str, int], pairs: Iterable[dict[str, Sequence[int]]]) -> tuple[int, int]:
    """(each prompt once, each prompt twice): with targets in the output layer only, and no padding."""
    shared = plain = 0
    for pair in pairs:
        prompt, chosen, rejected = (len(pair[f"{name}_ids"]) for name in ("prompt", "chosen", "rejected"))
        output = head_flops(shape, chosen + rejected)
        shared += output + body_flops(shape, prompt + chosen - 1) + body_flops(shape, rejected - 1, context=prompt)
        plain += output + body_flops(shape, prompt + chosen - 1) + body_flops(shape, prompt + rejected - 1)
    return shared, plain


def products_per_second(rows: int, inner: int, columns: int) -> float:
    """Operations a second of a matrix product of this shape on this machine: the best of five."""
    import torch

    left, right, out = torch.randn(rows, inner), torch.randn(columns, inner), torch.empty(rows, columns)
    seconds = []
    for _ in range(6):
        started = time.perf_counter()
        torch.mm(left, right.T, out=out)
        seconds.append(time.perf_counter() - started)
    return 2 * rows * inner * columns / min(seconds)
