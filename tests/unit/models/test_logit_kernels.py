"""Log-probabilities and gradients of logits: torch's operators and Liger's kernel against fp64."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from llmtrain.models import logit_kernels
from llmtrain.models.head import loss_of_tokens

DTYPES = ("torch.float32", "torch.bfloat16", "torch.float16")
SHAPES = ("1 x 2", "3 x 97", "17 x 1000", "5 x 33000", "2 x 151936")
ROUNDING = {"torch.float32": 1e-5, "torch.bfloat16": 2**-7, "torch.float16": 2**-10}
"""Relative errors of one rounding, and of exponentials in fp32. The interpreter truncates to bf16, a GPU rounds."""


@pytest.fixture(scope="module")
def parity() -> dict:
    """What liger_parity.py found, in a process that interprets Triton."""
    pytest.importorskip("triton", reason="liger-kernel needs Triton, which this platform has not")
    script = Path(__file__).parent / "liger_parity.py"
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_ligers_kernel_equals_fp64(parity: dict, dtype: str, shape: str):
    """`by targets` is relative to 1 - p where p is 0.999: rounding p first would leave nothing of it in bf16."""
    found = parity[f"{dtype} {shape}"]
    assert found["log_probs"] < 3e-6
    assert found["with and without gradient"] == 0
    assert found["by targets"] < max(1e-3, ROUNDING[dtype])
    assert found["by others"] < ROUNDING[dtype]


@pytest.mark.parametrize("at_once", [1, 8, 1_000])
@pytest.mark.parametrize(("precision", "rounding"), [("fp32", 2e-6), ("bf16", 1e-2)])
def test_losses_and_gradients_by_both_kernels_are_the_same(parity: dict, at_once: int, precision: str, rounding: float):
    """Under autocast the two round gradients of logits differently, and nothing else."""
    found = parity[f"losses {precision}, {at_once} at once"]
    of_gradients = {name: found.pop(name) for name in list(found) if name.startswith("of ")}
    assert len(of_gradients) == 4
    assert max(of_gradients.values()) < rounding
    assert max(found.values()) < 1e-6


def test_ligers_kernel_can_be_used_where_triton_runs_it_and_a_loss_may_have_no_targets(parity: dict):
    assert parity["why_not"] is None
    assert parity["nothing"] == 0


def test_torchs_kernel_equals_fp64():
    torch.manual_seed(0)
    logits, targets = 4 * torch.randn(17, 1_000), torch.randint(1_000, (17,))
    rows = torch.arange(17)
    exact = logits.double().log_softmax(1)
    wanted, gradient = exact[rows, targets], exact.exp()
    gradient[rows, targets] -= 1
    of_logits = logits.clone()
    found = logit_kernels.log_probs_and_gradient(of_logits, targets)
    torch.testing.assert_close(found.double(), wanted, atol=3e-6, rtol=0)
    torch.testing.assert_close(of_logits.double(), gradient, atol=3e-7, rtol=1e-5)
    torch.testing.assert_close(logit_kernels.log_probs(logits.clone(), targets).double(), wanted, atol=3e-6, rtol=0)


def test_bf16_keeps_the_gradient_of_a_target_that_is_nearly_certain():
    """p = 0.998 of 2 entries: the gradient by the winning logit is -0.002, and 0.998 rounded to bf16 is 1.0."""
    hidden = torch.tensor([[6.25]], requires_grad=True)
    weight = torch.tensor([[0.5], [-0.5]], requires_grad=True)  # logits 3.125 and -3.125, exact in bf16
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = loss_of_tokens(hidden, weight, torch.tensor([0]), 1.0, 8)
    (of_hidden,) = torch.autograd.grad(loss, hidden)
    lacking = torch.sigmoid(torch.tensor(-6.25, dtype=torch.float64)).item()  # 1 - p
    assert lacking == pytest.approx(0.001927, rel=1e-3)
    assert of_hidden.item() == pytest.approx(-lacking, rel=1e-2)


def test_what_keeps_a_process_from_ligers_kernel_is_said(monkeypatch: pytest.MonkeyPatch):
    def other_kernel(*_: object) -> None:
        raise TypeError("missing a required argument: 'another'\nand a page of Triton's")

    why_not = logit_kernels.why_not_liger
    monkeypatch.setattr(logit_kernels, "find_spec", lambda name: None)
    assert why_not("cpu") == "liger-kernel is not installed"
    monkeypatch.setattr(logit_kernels, "find_spec", lambda name: name)
    monkeypatch.setattr(logit_kernels, "liger_log_probs", lambda logits, targets, _: logits[:, 0])
    assert why_not("cpu") == "liger-kernel computes something else than PyTorch"
    monkeypatch.setattr(logit_kernels, "liger_log_probs", other_kernel)
    assert why_not("cpu") == "liger-kernel cannot be used here: TypeError: missing a required argument: 'another'"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("kernel", ["torch", "liger"])
def test_on_cuda_both_kernels_give_the_loss_and_gradients_of_fp64(kernel: logit_kernels.Kernel):
    """bf16 products, the weight's gradient added up in fp32 over four chunks."""
    if kernel == "liger" and (reason := logit_kernels.why_not_liger("cuda")):
        pytest.skip(f"needs CUDA and liger-kernel: {reason}")
    torch.manual_seed(0)
    hidden = torch.randn(512, 64, device="cuda", requires_grad=True)
    weight = torch.randn(5_000, 64, device="cuda", requires_grad=True)
    targets = torch.randint(5_000, (512,), device="cuda")
    exact = torch.nn.functional.cross_entropy(hidden.double() @ weight.double().T, targets, reduction="sum")
    with logit_kernels.using(kernel), torch.autocast("cuda", dtype=torch.bfloat16):
        found = loss_of_tokens(hidden, weight, targets, 1.0, 128)
    assert found.item() == pytest.approx(exact.item(), rel=1e-3)
    wanted = torch.autograd.grad(exact, (hidden, weight))
    for one, other in zip(torch.autograd.grad(found, (hidden, weight)), wanted, strict=True):
        assert one.dtype == torch.float32
        assert (one - other).norm() < 1e-2 * other.norm()
