"""What a config asks of a machine is resolved, or refused, before anything is computed."""

from pathlib import Path

import pytest
import torch

from llmtrain.config.compose import load_config
from llmtrain.errors import UserError
from llmtrain.training import device
from llmtrain.training.batches import TextSteps
from llmtrain.training.module import Pretraining


def test_cuda_without_a_device_is_refused_with_the_option_to_choose():
    if torch.cuda.is_available():
        pytest.skip("needs CUDA absent")
    with pytest.raises(UserError, match="infra=local_cpu"):
        device.resolve(load_config(["infra=local_gpu"]).infra)


def test_bf16_if_fast_becomes_what_this_processor_multiplies_itself():
    flags = Path("/proc/cpuinfo").read_text()
    wanted = "bf16" if "avx512_bf16" in flags or "amx_bf16" in flags else "fp32"
    infra = load_config(["infra.precision=bf16_if_fast"]).infra
    assert device.resolve(infra).precision == wanted


def test_a_precision_that_is_named_stays():
    assert device.resolve(load_config(["infra.precision=bf16"]).infra).precision == "bf16"


def test_bf16_computes_nearly_the_same_loss_and_gradient_with_fp32_weights(network, shards, pretrain_config):
    found = {}
    for precision in ("fp32", "bf16"):
        infra = pretrain_config.infra.model_copy(update={"precision": precision})
        step = TextSteps(shards, pretrain_config.trainer, 1_000)[0]
        module = Pretraining(network, pretrain_config.trainer, infra, total_tokens=1_000)
        network.zero_grad()
        with device.autocast(infra):
            loss = module.loss(step.micro_batches[0], step.num_units)
        loss.backward()
        found[precision] = (loss, torch.cat([parameter.grad.flatten() for parameter in network.parameters()]))
    (loss, gradient), (rough_loss, rough_gradient) = found["fp32"], found["bf16"]
    assert rough_loss.dtype == torch.float32
    assert 0 < abs(rough_loss - loss) / loss < 1e-2
    assert (rough_gradient - gradient).norm() / gradient.norm() < 5e-2
