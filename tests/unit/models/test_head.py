"""Loss and gradients in one pass equal those of all logits kept; no more than a chunk of them ever exists."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div, logsigmoid

from llmtrain.models.head import Chunk, chunks_of, loss_of_logits, loss_of_sums, loss_of_tokens
from llmtrain.models.logprobs import token_log_probs

WIDTH = 12


def setting(num_targets: int, vocabulary: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """hidden [targets, width], weight [vocabulary, width], targets [targets]"""
    torch.manual_seed(num_targets + vocabulary)
    hidden, weight = torch.randn(num_targets, WIDTH), torch.randn(vocabulary, WIDTH)
    return (
        hidden.to(dtype).requires_grad_(),
        weight.to(dtype).requires_grad_(),
        torch.randint(vocabulary, (num_targets,)),
    )


def gradients(loss: Tensor, *tensors: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss, tensors))


def assert_near(ours: list[Tensor], theirs: list[Tensor], tolerance: float) -> None:
    for one, other in zip(ours, theirs, strict=True):
        assert one.dtype == other.dtype
        assert (one - other).norm() <= tolerance * other.norm() + 1e-300


def pairwise_loss(sums: Tensor, owners: slice) -> Tensor:
    """A loss of pairs that weighs each one differently, by its number in the row."""
    pairs = torch.arange(owners.start, owners.stop, 2, dtype=sums.dtype)
    return (-logsigmoid(0.3 * (sums[0::2] - sums[1::2])) * (1 + pairs)).sum()


COUNTS = {
    "pairs": [3, 5, 1, 1, 2, 7],
    "an answer without a target": [3, 0, 2, 2],
    "single tokens": [1, 1, 1, 1, 1, 1, 1, 1],
    "one pair": [4, 9],
    "a pair without targets": [0, 0, 5, 3],
    "nothing": [0, 0],
    "no pair": [],
}
PRECISION = {torch.float64: 1e-12, torch.float32: 1e-5}


@pytest.mark.parametrize("dtype", PRECISION)
@pytest.mark.parametrize("vocabulary", [2, 97])
@pytest.mark.parametrize("chunk_tokens", [1, 8, 1_000])
@pytest.mark.parametrize("counts", COUNTS)
def test_a_loss_of_sums_and_its_gradients_equal_those_of_all_logits(counts, chunk_tokens, vocabulary, dtype):
    lengths = torch.tensor(COUNTS[counts], dtype=torch.int64)
    owners = torch.arange(len(lengths)).repeat_interleave(lengths)
    hidden, weight, targets = setting(len(owners), vocabulary, dtype)
    log_probs = (hidden @ weight.T).log_softmax(1).gather(1, targets[:, None]).squeeze(1)
    sums = log_probs.new_zeros(len(lengths)).index_add(0, owners, log_probs)
    theirs = pairwise_loss(sums, slice(0, len(lengths)))

    chunks = chunks_of(COUNTS[counts], 2, chunk_tokens)
    ours = loss_of_sums(hidden, weight, targets, owners, chunks, pairwise_loss, chunk_tokens)
    torch.testing.assert_close(ours, theirs, rtol=PRECISION[dtype], atol=PRECISION[dtype])
    assert_near(gradients(ours, hidden, weight), gradients(theirs, hidden, weight), PRECISION[dtype])


@pytest.mark.parametrize("num_targets", [0, 1, 17])
@pytest.mark.parametrize("chunk_tokens", [1, 4, 100])
@pytest.mark.parametrize("dtype", PRECISION)
def test_cross_entropy_equals_torchs(num_targets, chunk_tokens, dtype):
    hidden, weight, targets = setting(num_targets, 97, dtype)
    theirs = cross_entropy(hidden @ weight.T, targets, reduction="sum") / 7
    ours = loss_of_tokens(hidden, weight, targets, 1 / 7, chunk_tokens)
    torch.testing.assert_close(ours, theirs, rtol=PRECISION[dtype], atol=0)
    assert_near(gradients(3 * ours, hidden, weight), gradients(3 * theirs, hidden, weight), PRECISION[dtype])


@pytest.mark.parametrize("chunk_tokens", [1, 4, 100])
@pytest.mark.parametrize("dtype", PRECISION)
def test_a_loss_of_whole_distributions_equals_torchs(chunk_tokens, dtype):
    hidden, weight, _ = setting(17, 97, dtype)
    teacher = torch.randn(17, 97, dtype=dtype).log_softmax(1)
    theirs = kl_div((hidden @ weight.T).log_softmax(1), teacher, reduction="sum", log_target=True)

    def divergence(logits: Tensor, where: slice) -> Tensor:
        return kl_div(logits.log_softmax(1), teacher[where], reduction="sum", log_target=True)

    ours = loss_of_logits(hidden, weight, divergence, chunk_tokens)
    torch.testing.assert_close(ours, theirs, rtol=PRECISION[dtype], atol=0)
    assert_near(gradients(ours, hidden, weight), gradients(theirs, hidden, weight), PRECISION[dtype])


@pytest.mark.parametrize("trains", ["hidden", "weight", "neither"])
@pytest.mark.parametrize("kind", ["sums", "tokens", "logits"])
def test_what_is_frozen_has_no_gradient_and_the_rest_the_same(kind, trains):
    hidden, weight, targets = setting(11, 31)
    owners = torch.arange(11) // 3

    def loss(hidden: Tensor, weight: Tensor) -> Tensor:
        match kind:
            case "sums":
                chunks = chunks_of(owners.bincount().tolist(), 2, 4)
                return loss_of_sums(hidden, weight, targets, owners, chunks, pairwise_loss, 4)
            case "tokens":
                return loss_of_tokens(hidden, weight, targets, 0.5, 4)
            case _:
                return loss_of_logits(hidden, weight, lambda logits, _: logits.square().sum(), 4)

    whole = loss(hidden, weight)
    of_hidden, of_weight = gradients(whole, hidden, weight)
    frozen = loss(hidden if trains == "hidden" else hidden.detach(), weight if trains == "weight" else weight.detach())
    assert frozen.item() == whole.item()
    match trains:
        case "hidden":
            assert torch.equal(*gradients(frozen, hidden), of_hidden)
        case "weight":
            assert torch.equal(*gradients(frozen, weight), of_weight)
        case _:
            assert not frozen.requires_grad


def slopes(loss: Callable[[], Tensor], tensor: Tensor) -> Tensor:
    """The derivative of `loss` by each element, by central differences."""
    found, flat = torch.empty_like(tensor), tensor.detach().view(-1)
    for place in range(len(flat)):
        value, ends = flat[place].item(), []
        for step in (1e-6, -1e-6):
            flat[place] = value + step
            ends.append(loss().item())
        flat[place] = value
        found.view(-1)[place] = (ends[0] - ends[1]) / 2e-6
    return found.detach()


@pytest.mark.parametrize("kind", ["sums", "tokens", "logits", "tied"])
def test_gradients_are_the_slopes_of_the_loss(kind):
    """Numerical derivatives: no formula is involved. `tied`: the hidden states are made of the same weight."""
    hidden, weight, targets = setting(7, 9)
    owners = torch.tensor([0, 0, 0, 1, 2, 3, 3])
    chunks = chunks_of([3, 1, 1, 2], 2, 3)
    losses = {
        "sums": lambda: loss_of_sums(hidden, weight, targets, owners, chunks, pairwise_loss, 3),
        "tokens": lambda: loss_of_tokens(hidden, weight, targets, 0.3, 3),
        "logits": lambda: loss_of_logits(hidden, weight, lambda logits, _: logits.sin().sum(), 3),
        "tied": lambda: loss_of_tokens(hidden * weight[targets - 1].sin(), weight, targets, 0.3, 3),
    }
    loss = losses[kind]
    found = torch.autograd.grad(loss(), (hidden, weight))
    for gradient, tensor in zip(found, (hidden, weight), strict=True):
        torch.testing.assert_close(gradient, slopes(loss, tensor), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("chunk_tokens", [3, 1_000])
def test_under_autocast_products_are_in_bf16_and_sums_in_fp32(chunk_tokens):
    lengths = torch.tensor([3, 5, 2, 6])
    owners = torch.arange(4).repeat_interleave(lengths)
    hidden, weight, targets = setting(16, 97, torch.float32)
    chunks = chunks_of(lengths.tolist(), 2, chunk_tokens)
    exact = loss_of_sums(hidden, weight, targets, owners, chunks, pairwise_loss, chunk_tokens)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rough = loss_of_sums(hidden, weight, targets, owners, chunks, pairwise_loss, chunk_tokens)
    assert rough.dtype == torch.float32
    assert 0 < abs(rough - exact) < 2e-2 * exact
    assert_near(gradients(rough, hidden, weight), gradients(exact, hidden, weight), 2e-2)


@pytest.mark.parametrize(
    ("counts", "group", "chunk_tokens", "expected"),
    [
        ([3, 5, 1, 1, 2, 7], 2, 10, [(0, 10, 0, 4), (10, 19, 4, 6)]),
        ([3, 5, 1, 1, 2, 7], 2, 8, [(0, 8, 0, 2), (8, 10, 2, 4), (10, 19, 4, 6)]),
        ([3, 5, 1, 1, 2, 7], 2, 1, [(0, 8, 0, 2), (8, 10, 2, 4), (10, 19, 4, 6)]),
        ([4, 4, 4], 1, 8, [(0, 8, 0, 2), (8, 12, 2, 3)]),
        ([0, 0, 3, 0], 1, 3, [(0, 3, 0, 4)]),
        ([], 2, 8, []),
    ],
)
def test_chunks_are_whole_groups(counts, group, chunk_tokens, expected):
    assert chunks_of(counts, group, chunk_tokens) == [Chunk(slice(a, b), slice(c, d)) for a, b, c, d in expected]


class Watch(torch.utils._python_dispatch.TorchDispatchMode):
    """The most elements of any tensor that an operation gave."""

    largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor):
            self.largest = max(self.largest, out.numel())
        return out


@pytest.mark.parametrize("kind", ["tokens", "sums", "one long group", "logits"])
def test_no_more_than_a_chunk_of_logits_exists(kind):
    """The largest tensor that the loss allocates has chunk * vocabulary elements, forward and backward."""
    vocabulary, chunk, num_targets = 1_000, 16, 512
    hidden, weight, targets = setting(num_targets, vocabulary, torch.float32)
    owners = torch.arange(num_targets) // (num_targets // 2 if kind == "one long group" else 4)
    chunks = chunks_of(owners.bincount().tolist(), 2, chunk)
    with Watch() as watch:
        match kind:
            case "tokens":
                loss = loss_of_tokens(hidden, weight, targets, 1.0, chunk)
            case "logits":
                loss = loss_of_logits(hidden, weight, lambda logits, _: logits.log_softmax(1).sum(), chunk)
            case _:
                loss = loss_of_sums(hidden, weight, targets, owners, chunks, pairwise_loss, chunk)
        loss.backward()
    assert watch.largest == max(chunk * vocabulary, vocabulary * WIDTH)
    assert math.isfinite(loss.item())


def test_a_group_that_is_longer_than_a_chunk_is_passed_over_twice_and_no_other():
    class Products(torch.utils._python_dispatch.TorchDispatchMode):
        rows = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            if "mm" in function.__name__ and out.shape[-1:] == (50,):
                self.rows += len(out)
            return out

    hidden, weight, targets = setting(20, 50)
    owners = torch.tensor([0] * 4 + [1] * 10 + [2] * 3 + [3] * 3)
    with Products() as products:
        loss_of_sums(hidden, weight, targets, owners, chunks_of([4, 10, 3, 3], 2, 8), pairwise_loss, 8)
    assert products.rows == 14 + 14 + 6


class Rows(torch.utils._python_dispatch.TorchDispatchMode):
    """The sizes of all operands of matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: set[int] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.__name__.startswith(("mm", "addmm")):
            self.sizes |= {size for arg in args if isinstance(arg, Tensor) for size in arg.shape}
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(("precision", "rows"), [("bf16", {128, 256}), ("fp32", {5, 100, 129, 200, 256})])
def test_products_in_bf16_on_a_cpu_have_few_shapes(precision, rows):
    """oneDNN makes code for each: rows are filled up to multiples of 128, in training and in scoring."""
    output, sizes = torch.nn.Linear(WIDTH, 97, bias=False), set()
    for number in (5, 100, 129, 200, 256):
        hidden, _, targets = setting(number, 97, torch.float32)
        exact = cross_entropy(hidden @ output.weight.T, targets, reduction="sum")
        with Rows() as seen, torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bf16"):
            loss = loss_of_tokens(hidden, output.weight, targets, 1.0, 1_000)
            scored = token_log_probs(hidden, output, targets, 1_000)
        sizes |= seen.sizes
        assert loss.item() == pytest.approx(exact.item(), rel=1e-2)
        assert (len(scored), -scored.sum().item()) == (number, pytest.approx(exact.item(), rel=1e-2))
        ours, theirs = (torch.autograd.grad(total, (hidden, output.weight)) for total in (loss, exact))
        assert_near(list(ours), list(theirs), 2e-2)
    assert sizes - {WIDTH, 97} == rows


def test_a_factor_of_the_loss_is_not_rounded_to_bf16():
    """1/1000 in bf16 is 0.055 % too small, and so would be every gradient."""
    hidden, weight, targets = setting(200, 97, torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        scaled, plain = (loss_of_tokens(hidden, weight, targets, scale, 1_000) for scale in (1e-3, 1.0))
    for ours, wanted in zip(gradients(scaled, hidden, weight), gradients(plain, hidden, weight), strict=True):
        ratio = (1000 * ours * wanted).sum() / wanted.square().sum()
        assert ratio.item() == pytest.approx(1, abs=3e-4)
