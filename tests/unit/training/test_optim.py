"""Muon against PyTorch's own, the composite's resume, what each optimizer decays, and sharded parameters."""

import copy
import io
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn, optim
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from llmtrain.config.compose import load_config
from llmtrain.config.trainer import Trainer
from llmtrain.errors import UserError
from llmtrain.models.build import build
from llmtrain.training.optim import MuonWithAdamW, muon, optimizer_of, orthogonal


def trainer(optimizer: str = "adamw") -> Trainer:
    values = {"optimizer": optimizer, "lr": 1e-2, "weight_decay": 0.1, "muon_momentum": 0.9}
    return load_config(["model=qwen3_tiny", *(f"trainer.{name}={value}" for name, value in values.items())]).trainer


def gradients(network: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in network.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)


def steps(network: nn.Module, optimizer: optim.Optimizer, seeds: range) -> None:
    for seed in seeds:
        gradients(network, seed)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def names_in(group: dict, network: nn.Module) -> set[str]:
    ids = {id(parameter) for parameter in group["params"]}
    return {name for name, parameter in network.named_parameters() if id(parameter) in ids}


def test_singular_values_of_the_update_lie_between_0_68_and_1_21_and_its_vectors_are_the_gradients():
    torch.manual_seed(0)
    for shape in ((40, 90), (90, 40)):
        matrix = torch.randn(shape, dtype=torch.float64)
        u, values, vh = torch.linalg.svd(matrix, full_matrices=False)
        assert values.min() > 0.002 * matrix.norm()
        inner = u.T @ orthogonal(matrix) @ vh.T
        assert inner.diagonal().min() >= 0.68
        assert inner.diagonal().max() <= 1.21
        assert (inner - inner.diagonal().diag()).norm() < 1e-10


@pytest.mark.parametrize("exactly", [True, False])
def test_muon_steps_as_torchs_does(network: PreTrainedModel, monkeypatch, exactly):
    """Exactly, where torch's is kept from rounding to bf16; as it is, up to that rounding."""
    if exactly:
        monkeypatch.setattr(Tensor, "bfloat16", lambda tensor: tensor)
    ours, theirs = network.double(), copy.deepcopy(network).double()
    settings = trainer("muon")
    optimizer = optimizer_of(ours, settings, "cpu")
    matrices = names_in(optimizer.param_groups[0], ours)
    before = {name: parameter.detach().clone() for name, parameter in ours.named_parameters()}
    steps(ours, optimizer, range(3))

    parameters = [parameter for name, parameter in theirs.named_parameters() if name in matrices]
    steps(
        theirs,
        optim.Muon(parameters, lr=1e-2, weight_decay=0.1, momentum=0.9, adjust_lr_fn="match_rms_adamw"),
        range(3),
    )
    for name, parameter in theirs.named_parameters():
        if name in matrices:
            moved = (parameter - before[name]).norm()
            difference = (ours.get_parameter(name) - parameter).norm()
            assert difference <= (1e-12 if exactly else 3e-2) * moved
            assert moved > 0


def test_muon_has_the_matrices_of_the_blocks_and_adamw_the_rest(network: PreTrainedModel):
    settings = trainer("muon")
    optimizer = optimizer_of(network, settings, "cpu")
    matrices, decayed, vectors = (names_in(group, network) for group in optimizer.param_groups)
    projections = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    assert matrices == {name for name, _ in network.named_parameters() if name.split(".")[-2] in projections}
    assert decayed == {"model.embed_tokens.weight"}  # the output layer is the same tensor
    assert len(matrices) + len(decayed) + len(vectors) == len(list(network.parameters()))
    assert all(network.get_parameter(name).ndim == 1 for name in vectors)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.1, 0.0]


def test_adamws_part_steps_as_adamw_alone(network: PreTrainedModel):
    alone = copy.deepcopy(network)
    steps(network, optimizer_of(network, trainer("muon"), "cpu"), range(3))
    steps(alone, optimizer_of(alone, trainer("adamw"), "cpu"), range(3))
    for name in ("model.embed_tokens.weight", "model.norm.weight", "model.layers.0.self_attn.q_norm.weight"):
        assert torch.equal(network.get_parameter(name), alone.get_parameter(name))
    assert not torch.equal(
        network.get_parameter("model.layers.0.mlp.up_proj.weight"),
        alone.get_parameter("model.layers.0.mlp.up_proj.weight"),
    )


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_a_resumed_optimizer_goes_on_bit_for_bit(network: PreTrainedModel, name):
    settings = trainer(name)
    optimizer = optimizer_of(network, settings, "cpu")
    steps(network, optimizer, range(3))
    file = io.BytesIO()
    torch.save({"model": network.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    steps(network, optimizer, range(3, 6))

    resumed = build(load_config(["model=qwen3_tiny"]).model)
    resumed.load_state_dict(saved["model"])
    again = optimizer_of(resumed, settings, "cpu")
    again.load_state_dict(saved["optimizer"])
    steps(resumed, again, range(3, 6))
    for name, parameter in network.named_parameters():
        assert torch.equal(parameter, resumed.get_parameter(name)), name


def test_the_learning_rate_of_each_group_is_what_its_param_group_says(network: PreTrainedModel):
    optimizer = optimizer_of(network, trainer("muon"), "cpu")
    optimizer.load_state_dict(optimizer.state_dict())
    for group in optimizer.param_groups:
        assert group["lr"] == 1e-2
        group["lr"] = 0.0
    before = copy.deepcopy(network.state_dict())
    steps(network, optimizer, range(1))
    for name, tensor in network.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_muons_step_has_the_size_of_adamws_first():
    """An orthogonal update has the root mean square 1 / sqrt(longer side); times 0.2 sqrt(longer side) that is 0.2."""
    matrix = nn.Parameter(torch.zeros(64, 256))
    optimizer = MuonWithAdamW([matrix], [], trainer("muon"))
    torch.manual_seed(0)
    matrix.grad = torch.randn(64, 256)
    optimizer.step()
    assert matrix.square().mean().sqrt().item() == pytest.approx(0.2 * 1e-2, rel=0.15)


def test_muon_learns_through_its_closure_and_a_frozen_matrix_stays(network: PreTrainedModel):
    frozen = network.get_parameter("model.layers.0.mlp.up_proj.weight").requires_grad_(False)
    kept = frozen.clone()
    optimizer = optimizer_of(network, trainer("muon"), "cpu")
    ids = torch.arange(40)[None]

    def closure() -> float:
        optimizer.zero_grad()
        loss = network(input_ids=ids, labels=ids).loss
        loss.backward()
        return loss.item()

    losses = [optimizer.step(closure) for _ in range(8)]
    assert losses[-1] < losses[0] - 1
    assert torch.equal(frozen, kept)


def test_adamw_decays_matrices_and_no_vectors(network: PreTrainedModel):
    decayed, vectors = optimizer_of(network, trainer("adamw"), "cpu").param_groups
    assert (decayed["weight_decay"], vectors["weight_decay"]) == (0.1, 0.0)
    assert {parameter.ndim for parameter in decayed["params"]} == {2}
    assert {parameter.ndim for parameter in vectors["params"]} == {1}
    assert decayed["fused"]


def test_adamw_8bit_says_what_to_do_on_a_cpu_and_without_its_package(network: PreTrainedModel, monkeypatch):
    settings = trainer("adamw_8bit")
    with pytest.raises(UserError, match=r"infra.accelerator=cpu.*trainer.optimizer=adamw, or choose infra=local_gpu"):
        optimizer_of(network, settings, "cpu")
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    with pytest.raises(UserError, match=r"pip install bitsandbytes, or set trainer\.optimizer=adamw"):
        optimizer_of(network, settings, "cuda")


def test_muon_is_refused_for_an_adapter_of_low_rank_factors(network: PreTrainedModel):
    from peft import LoraConfig, get_peft_model

    adapted = get_peft_model(network, LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(UserError, match=r"trainer.optimizer=adamw, or adapter=none"):
        muon(adapted, trainer("muon"))
    assert optimizer_of(adapted, trainer("adamw"), "cpu").param_groups[0]["params"]


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_two_ranks_with_sharded_parameters_step_as_one(tmp_path: Path, name):
    torch.multiprocessing.spawn(_compare_sharded, (2, tmp_path, name), nprocs=2)


def _compare_sharded(rank: int, num_ranks: int, directory: Path, name: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{directory}/store", rank=rank, world_size=num_ranks)
    torch.manual_seed(0)
    whole = build(load_config(["model=qwen3_tiny"]).model)
    sharded = copy.deepcopy(whole)
    fully_shard(sharded, mesh=init_device_mesh("cpu", (num_ranks,)))
    settings, ids = trainer(name), torch.arange(40)[None]
    for network in (whole, sharded):
        optimizer = optimizer_of(network, settings, "cpu")
        for _ in range(3):
            network(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    for name, parameter in sharded.named_parameters():
        assert isinstance(parameter, DTensor)
        expected = whole.get_parameter(name)
        assert (parameter.full_tensor() - expected).norm() <= 1e-5 * expected.norm(), name
    dist.destroy_process_group()
