"""Checkpoints whose tensors lie on several ranks, and the way from any number of ranks to any other.

    state.pt      all that is not sharded, and under "sharded" where each sharded tensor belongs, and to which parameter
    shards/       the sharded tensors, by torch.distributed.checkpoint

Without "sharded", state.pt is whole: what one process and ddp write. Every strategy but ZeRO reads both.
"""

import copy
from pathlib import Path
from typing import Any

import torch
from peft import inject_adapter_in_model
from torch import Tensor
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer
from transformers import PreTrainedModel

from llmtrain.errors import UserError
from llmtrain.models.adapter import is_attached
from llmtrain.training.ranks.alone import write_state

SHARDS = "shards"
MODULE_PREFIX = "model."
"""Of the network's parameters in the training module's state."""
Path_ = tuple[str | int, ...]


def write_sharded(
    checkpoint: dict[str, Any], directory: Path, model: PreTrainedModel, optimizer: Optimizer, first: bool
) -> None:
    """Write this rank's shards; the `first` rank also writes what is not sharded. All ranks call it."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    in_order = [names[id(parameter)] for group in optimizer.param_groups for parameter in group["params"]]
    rest, tensors = _without_shards(checkpoint, ())
    owners = {_key(path): (path, _owner(path, in_order)) for path in tensors}
    state_dict_saver.save({_key(path): tensor for path, tensor in tensors.items()}, checkpoint_id=directory / SHARDS)
    if first:
        write_state(rest | {"sharded": owners}, directory)


def read_sharded(directory: Path, model: PreTrainedModel) -> dict[str, Any]:
    """The checkpoint in which a tensor of a sharded parameter of `model` is sharded likewise."""
    parameters = dict(model.named_parameters(remove_duplicate=False))  # a tied weight has two names
    state = _read_state(directory)
    if "sharded" not in state:
        for name, tensor in state["state_dict"].items():
            parameter = parameters.get(name.removeprefix(MODULE_PREFIX))
            if isinstance(parameter, DTensor):
                state["state_dict"][name] = _cut(tensor, parameter)
        return state
    return _with_shards(state, directory, parameters, no_dist=False)


def read_whole(directory: Path) -> dict[str, Any]:
    """The checkpoint with plain tensors, whichever strategy wrote it."""
    state = _read_state(directory)
    return _with_shards(state, directory, {}, no_dist=True) if "sharded" in state else state


def cut_optimizer_state(optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    """A pre-hook of `load_state_dict`: whole tensors of a sharded parameter's shape become sharded likewise."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state = {
        index: {
            name: _cut(value, parameter)
            if isinstance(parameter, DTensor)
            and isinstance(value, Tensor)
            and not isinstance(value, DTensor)
            and value.shape == parameter.shape
            else value
            for name, value in state_dict["state"].get(index, {}).items()
        }
        for index, parameter in enumerate(parameters)
        if index in state_dict["state"]
    }
    return state_dict | {"state": state}


def plain_copy(model: PreTrainedModel, state: dict[str, Tensor]) -> PreTrainedModel:
    """A network like `model` that has the plain tensors of `state`, on the CPU, ties and adapter kept."""
    with torch.device("meta"):
        plain = type(model)(copy.deepcopy(model.config))
        if is_attached(model):
            inject_adapter_in_model(model.peft_config["default"], plain)
    plain.to_empty(device="cpu")
    plain.tie_weights()
    plain.load_state_dict(state)
    for name, buffer in model.named_buffers():
        plain.get_buffer(name).copy_(buffer)  # those that no state holds: rotary frequencies
    for name, parameter in model.named_parameters():
        plain.get_parameter(name).requires_grad_(parameter.requires_grad)
    return plain.train(model.training)


def _read_state(directory: Path) -> dict[str, Any]:
    state: dict[str, Any] = torch.load(directory / "state.pt", map_location="cpu", weights_only=True)
    if "zero" in state:
        raise UserError(
            f"{directory} was written by infra.strategy={state['zero']['strategy']} on {state['zero']['ranks']} ranks, "
            f"and only that reads it: set infra.strategy={state['zero']['strategy']} "
            f"infra.ranks={state['zero']['ranks']}, or start anew with --again"
        )
    return state


def _with_shards(state: dict[str, Any], directory: Path, parameters: dict[str, Any], no_dist: bool) -> dict[str, Any]:
    """`state` with the sharded tensors put back: sharded as their parameter in `parameters` is, whole without one."""
    owners: dict[str, tuple[Path_, str]] = state.pop("sharded")
    sizes = FileSystemReader(directory / SHARDS).read_metadata().state_dict_metadata
    tensors: dict[str, Any] = {}
    for key, (_, name) in owners.items():
        parameter = parameters.get(name)
        written: Any = sizes[key]
        if isinstance(parameter, DTensor) and parameter.shape == written.size:
            tensors[key] = torch.empty_like(parameter, dtype=written.properties.dtype).detach()
        else:
            tensors[key] = torch.empty(written.size, dtype=written.properties.dtype)
    state_dict_loader.load(tensors, checkpoint_id=directory / SHARDS, no_dist=no_dist)
    for key, (path, _) in owners.items():
        place: Any = state
        for step in path[:-1]:
            place = place[step]
        place[path[-1]] = tensors[key]
    return state


def _cut(tensor: Tensor, parameter: DTensor) -> DTensor:
    """This rank's part of a whole `tensor`, as `parameter` is cut. No rank hears from another."""
    whole = tensor.to(parameter.device)
    return distribute_tensor(whole, parameter.device_mesh, parameter.placements, src_data_rank=None)


def _without_shards(tree: Any, path: Path_) -> tuple[Any, dict[Path_, DTensor]]:
    """`tree` without its DTensors, and those by their place in it."""
    if not isinstance(tree, dict | list | tuple):
        return tree, {}
    sharded: dict[Path_, DTensor] = {}
    kept: list[tuple[Any, Any]] = []
    for step, node in tree.items() if isinstance(tree, dict) else enumerate(tree):
        if isinstance(node, DTensor):
            sharded[(*path, step)] = node
            continue
        rest, more = _without_shards(node, (*path, step))
        kept.append((step, rest))
        sharded |= more
    return dict(kept) if isinstance(tree, dict) else type(tree)(node for _, node in kept), sharded


def _owner(path: Path_, optimizer_order: list[str]) -> str:
    """The parameter that the tensor at `path` of a checkpoint belongs to."""
    match path:
        case ("state_dict", str(name)):
            return name.removeprefix(MODULE_PREFIX)
        case ("optimizer_states", 0, "state", int(index), _):
            return optimizer_order[index]
    raise AssertionError(f"no sharded tensor is expected at {path}")


def _key(path: Path_) -> str:
    return "/".join(map(str, path))
