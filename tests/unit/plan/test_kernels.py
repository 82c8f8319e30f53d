"""How long a kernel takes: timed on a part, against a product of matrices, and kept."""

from pathlib import Path

import pytest
import torch

from llmtrain.plan import kernels as module
from llmtrain.plan import machine
from llmtrain.plan.kernels import Kernels
from llmtrain.plan.trace import Op, Shape


def product(m: int, k: int, n: int) -> Op:
    left, right = Shape((m, k), (k, 1), torch.float32), Shape((k, n), (n, 1), torch.float32)
    return Op("forward", "aten.mm.default", (left, right), (), 4 * (m * k + k * n + m * n), 2 * m * k * n)


@pytest.mark.parametrize(
    ("sizes", "part", "scale"),
    [
        ((64, 64, 64), (64, 64, 64), 1),
        ((4096, 256, 1024), (1024, 256, 1024), 4),
        ((1024, 1024, 1024), (512, 512, 512), 8),  # three dimensions of one length are halved together
        ((1024, 768, 2048), (512, 768, 512), 8),  # 2,048 becomes 1,024, and then both
    ],
)
def test_a_part_stands_for_as_much_as_it_computes_less(sizes: tuple[int, ...], part: tuple[int, ...], scale: float):
    (left, right), _, found = module._part(product(*sizes))
    assert ((*left.size, right.size[1]), found) == (part, scale)


def test_an_elementwise_kernel_is_scaled_by_its_entries():
    square = Shape((8192, 8192), (8192, 1), torch.float32)
    op = Op("forward", "aten.mul.Tensor", (square, square), (), 3 * square.num_bytes, 0)
    (left, _), _, scale = module._part(op)
    assert (left.size, scale) == ((1024, 1024), 64)


def test_disturbances_cancel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    small, large = product(8, 8, 8), product(16, 16, 16)
    slow_down = iter([2.0, 1.0, 1.0, 3.0, 1.0, 1.0, 2.5, 1.0, 1.0, 4.0, 1.0, 1.0])  # three times both, then large
    now = 1.0

    def product_seconds(_: machine.Probe) -> float:
        nonlocal now
        now = next(slow_down)
        return 0.01 * now

    monkeypatch.setattr(machine.Probe, "product_seconds", product_seconds)
    monkeypatch.setattr(module, "_measured", lambda op, others: now * (0.005 if op is small else 0.2))
    monkeypatch.setattr(module, "_ENOUGH_S", 0.0)
    first = Kernels(tmp_path, {"device": "x"})
    first.know([small, large, small])
    first.keep()
    second = Kernels(tmp_path, {"device": "x"})
    second.know([large])  # nothing is timed again: there is no thirteenth product
    assert next(slow_down, None) is None
    assert (second.seconds(small), second.seconds(large)) == (pytest.approx(0.005), pytest.approx(0.2))
    assert second.product_seconds == pytest.approx(0.01)
