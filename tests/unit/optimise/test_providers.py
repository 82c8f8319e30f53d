"""Execution providers that this machine has, and what is said of the others."""

import pytest

from llmtrain.errors import ConfigError, UserError
from llmtrain.optimise.providers import available
from tests.unit.optimise.conftest import settings


def test_those_that_are_missing_here_are_left_out_and_said():
    said: list[str] = []
    found = available(["TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider"], said.append)
    assert found == ("CPUExecutionProvider",)
    assert said == [
        "ONNX Runtime computes with CPUExecutionProvider; not here: TensorrtExecutionProvider, CUDAExecutionProvider "
        "(in the package onnxruntime-gpu)"
    ]


def test_a_name_that_does_not_exist_is_refused():
    with pytest.raises(UserError, match=r"knows no CpuProvider; it knows .*CPUExecutionProvider"):
        available(["CpuProvider"], print)


def test_the_cpu_comes_last():
    with pytest.raises(ConfigError, match="must end with CPUExecutionProvider"):
        settings("onnx_int8", "providers=[CUDAExecutionProvider]")
