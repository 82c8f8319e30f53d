"""What a config asks of a machine is resolved, or refused; what is computed again or compiled is the same."""

import copy
import sys
from pathlib import Path

import pytest
import torch
from oracles import gradients_of, in_fp64, largest_difference, whole_loss
from transformers import GPT2Config, GPT2LMHeadModel

from llmtrain.config.compose import load_config
from llmtrain.errors import UnsupportedModel, UserError
from llmtrain.models import logit_kernels
from llmtrain.models.attention import use
from llmtrain.training import device
from llmtrain.training.batches import TextSteps
from llmtrain.training.module import CrossEntropy


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


@pytest.mark.parametrize(
    ("overrides", "kernel"),
    [
        (["infra=local_cpu"], "segments"),
        (["infra=local_cpu", "infra.compile=true"], "compiled_segments"),
        (["infra=local_gpu"], "flex"),
        (["infra=local_gpu", "infra.attention=sdpa"], "sdpa"),
    ],
)
def test_the_kernel_is_that_of_the_accelerator_unless_one_is_named(overrides, kernel):
    assert device.attention_kernel(load_config(overrides).infra) == kernel


MISSING = "liger-kernel is not installed"


@pytest.mark.parametrize(
    ("overrides", "why_not", "words"),
    [
        (["infra=local_cpu"], None, "loss by torch"),
        (["infra=local_gpu"], None, "loss by liger"),
        (["infra=local_gpu"], MISSING, f"loss by torch ({MISSING})"),
        (["infra=local_gpu", "infra.loss_kernel=torch"], None, "loss by torch"),
        (["infra=local_gpu", "infra.loss_kernel=liger"], None, "loss by liger"),
    ],
)
def test_the_loss_is_by_liger_where_it_can_be_and_the_run_says_so(monkeypatch, overrides, why_not, words):
    monkeypatch.setattr(logit_kernels, "why_not_liger", lambda device: why_not)
    with logit_kernels.using("torch"):
        assert device.use_loss_kernel(load_config(overrides).infra) == words
        assert logit_kernels.chosen() == words.split()[2]


def test_a_kernel_that_is_named_and_cannot_be_used_is_refused_with_what_to_install(monkeypatch):
    infra = load_config(["infra=local_gpu", "infra.loss_kernel=liger"]).infra
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    refused = rf"loss_kernel=liger: {MISSING}; pip install 'llmtrain\[cuda]'"
    with monkeypatch.context() as missing:
        missing.setattr(logit_kernels, "find_spec", lambda name: None)
        with pytest.raises(UserError, match=refused):
            device.check(infra)
    monkeypatch.setattr(logit_kernels, "why_not_liger", lambda device: MISSING)
    with pytest.raises(UserError, match=refused):
        device.use_loss_kernel(infra)
    with pytest.raises(UserError, match=r"loss_kernel=liger needs infra.accelerator=cuda; set infra.loss_kernel=auto"):
        load_config(["infra.loss_kernel=liger"])


def test_compiling_on_a_cpu_without_a_compiler_is_refused_with_what_to_install(monkeypatch):
    infra = load_config(["infra.compile=true"]).infra
    monkeypatch.setattr(torch._inductor.config.cpp, "cxx", (None, "/nonexistent/g++"))
    with pytest.raises(
        UserError, match=r"needs a C\+\+ compiler: .*apt-get install g\+\+.*or set infra\.compile=false"
    ):
        device.check(infra)
    monkeypatch.setattr(torch._inductor.config.cpp, "cxx", (None, sys.executable))  # whatever starts
    device.check(infra)


class Products(torch.utils._python_dispatch.TorchDispatchMode):
    """Counts matrix products."""

    number = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.number += function in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
        return function(*args, **(kwargs or {}))


def stepped(network, shards, config, number=0, **changes) -> tuple[CrossEntropy, float, int]:
    """(the module after a backward pass over a step, its loss, bytes that autograd itself kept until then)."""
    infra = config.infra.model_copy(update=changes)
    trainer = config.trainer.model_copy(update={"sequence_tokens": 64, "batch_rows": 2})
    step = TextSteps(shards, trainer, 1_000, "documents", infra)[number]
    module = CrossEntropy(network, trainer, infra, total_tokens=1_000)
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    network.zero_grad()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), device.autocast(infra):
        loss = whole_loss(module, step)
    return module, loss, sum(kept.values())


def test_bf16_computes_nearly_the_same_loss_and_gradient_with_fp32_weights(network, shards, pretrain_config):
    module, loss, _ = stepped(network, shards, pretrain_config)
    gradient = torch.cat([each.flatten() for each in gradients_of(module.model).values()])
    module, rough_loss, _ = stepped(network, shards, pretrain_config, precision="bf16")
    rough = torch.cat([each.flatten() for each in gradients_of(module.model).values()])
    assert rough.dtype == torch.float32
    assert 0 < abs(rough_loss - loss) / loss < 1e-2
    assert (rough - gradient).norm() / gradient.norm() < 5e-2


@pytest.mark.parametrize("kernel", ["segments", "sdpa"])
def test_recomputed_activations_give_the_same_gradients_from_less_memory(network, shards, pretrain_config, kernel):
    kept, losses, gradients, products = {}, {}, {}, {}
    for how in ("none", "selective", "full"):
        model = in_fp64(network)
        use(model, kernel)
        changes = {"activation_checkpointing": how}
        device.prepare(model, pretrain_config.infra.model_copy(update=changes))
        with Products() as counted:
            module, losses[how], kept[how] = stepped(model, shards, pretrain_config, **changes)
        gradients[how], products[how] = gradients_of(module.model), counted.number
        assert gradients[how].keys() == dict(network.named_parameters()).keys(), "names stay"
    assert losses["none"] == losses["selective"] == losses["full"]
    for how in ("selective", "full"):
        assert largest_difference(gradients[how], gradients["none"]) <= 1e-12
        assert kept[how] < kept["none"] / 4
    # a block has 7 products forward; the output of a block's last one is what the next begins with, and not needed
    assert products["selective"] == products["none"]
    assert products["full"] - products["none"] in (2 * 6, 2 * 7)


def test_dropout_is_drawn_again_as_it_was(pretrain_config, shards):
    """Or the backward pass would belong to another forward pass."""
    from llmtrain.models.build import build

    shape, found = pretrain_config.model.model_copy(update={"attention_dropout": 0.3}), {}
    for how in ("none", "selective", "full"):
        torch.manual_seed(0)
        model = in_fp64(build(shape)).train()
        use(model, "segments")
        device.prepare(model, pretrain_config.infra.model_copy(update={"activation_checkpointing": how}))
        torch.manual_seed(1)
        module, _, _ = stepped(model, shards, pretrain_config)
        found[how] = gradients_of(module.model)
    assert largest_difference(found["selective"], found["none"]) <= 1e-12
    assert largest_difference(found["full"], found["none"]) <= 1e-12


@pytest.mark.parametrize("checkpointing", ["none", "full"])
def test_compiled_blocks_compute_the_same_and_are_compiled_once_for_all_steps(
    network, shards, pretrain_config, checkpointing, monkeypatch
):
    """By aot_eager: what is traced and cut into forward and backward graphs is run as it is, without a C++ compiler."""
    plain, compiled = in_fp64(network), in_fp64(network)
    honest = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **named: honest(self, backend="aot_eager", **named))
    changes = {"compile": True, "micro_batch_tokens": 128, "activation_checkpointing": checkpointing}
    infra = pretrain_config.infra.model_copy(update=changes)
    use(compiled, device.attention_kernel(infra))
    device.prepare(compiled, infra)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    try:
        ours, loss, _ = stepped(compiled, shards, pretrain_config, **changes)
        graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        assert graphs > 0, "nothing was compiled"
        gradients = gradients_of(ours.model)
        _, again, _ = stepped(compiled, shards, pretrain_config, **changes)
        others = {stepped(compiled, shards, pretrain_config, number, **changes)[1] for number in (1, 2, 3)}
        assert len(others) == 3
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs, "compiled anew"
    finally:
        torch._dynamo.reset()
    theirs, expected, _ = stepped(plain, shards, pretrain_config)
    assert again == loss == pytest.approx(expected, rel=1e-12)
    assert largest_difference(gradients, gradients_of(theirs.model)) <= 1e-9


def test_a_network_whose_blocks_are_not_known_is_refused():
    model = GPT2LMHeadModel(GPT2Config(vocab_size=97, n_embd=8, n_layer=1, n_head=1, n_positions=16))
    assert [type(block).__name__ for block in device.blocks(model)] == ["GPT2Block"]
    unknown = copy.copy(model)
    unknown._no_split_modules = None
    with pytest.raises(UnsupportedModel, match=r"infra\.compile=false"):
        device.blocks(unknown)


def test_threads_are_shared_out_among_the_ranks_of_a_machine(monkeypatch):
    before = torch.get_num_threads()
    infra = load_config(["infra.threads=null", "infra.deterministic=false"]).infra
    monkeypatch.setattr("os.sched_getaffinity", lambda process: set(range(8)))
    try:
        for ranks, threads in (("1", 8), ("4", 2), ("16", 1)):
            monkeypatch.setenv("LOCAL_WORLD_SIZE", ranks)
            device.apply(infra)
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
