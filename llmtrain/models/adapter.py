"""Low-rank adapters: put into a network, switched off, saved on their own, merged. peft has the layers.

A network with an adapter stays what it is: `base_model`, `get_output_embeddings` and the names of other layers do not
change; an adapted `q_proj` becomes a layer that holds `base_layer` (frozen), `lora_A` and `lora_B`.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from llmtrain.config.adapter import LoRAAdapter, QLoRAAdapter
from llmtrain.errors import UserError
from llmtrain.files import whole_directory

ALL_LINEAR = "all-linear"
PEFT_PREFIX = "base_model.model."
"""What peft's own wrapper puts before each name, and expects in its files."""


def attach(model: PreTrainedModel, adapter: LoRAAdapter | QLoRAAdapter) -> PreTrainedModel:
    """Freeze `model` and give the layers that `adapter` names trainable updates, which begin as zero; returns `model`.

    Draws from the global random generator. The network keeps its mode, but for the updates' dropout, which is on.
    Raises UserError where a target names no linear layer, or the output layer.
    """
    targets = _targets(model, adapter.targets)
    config = LoraConfig(
        r=adapter.rank,
        lora_alpha=adapter.alpha,
        lora_dropout=adapter.dropout,
        target_modules=list(targets),
        use_rslora=adapter.rslora,
        use_dora=adapter.dora,
        fan_in_fan_out=any(isinstance(layer, Conv1D) for layer in targets.values()),
        task_type="CAUSAL_LM",
    )
    inject_adapter_in_model(config, model)
    for parameter in model.parameters():
        if parameter.requires_grad:  # peft gives updates of 4-bit weights the type of the products
            parameter.data = parameter.data.float()
    for layer in _adapted(model).values():
        layer.train(model.training)
        layer.lora_dropout.train()
    return model


def is_attached(model: nn.Module) -> bool:
    return any(isinstance(layer, LoraLayer) for layer in model.modules())


@contextmanager
def adapter_off(model: nn.Module) -> Iterator[None]:
    """The network as it was before `attach`, bit for bit: DPO's reference, without a second copy."""
    layers = _adapted(model).values()
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)


def merge(model: PreTrainedModel) -> PreTrainedModel:
    """Add the updates to the weights, in place, and take the adapter out; returns the plain network.

    Weights in 4 bits become fp32 first: in 4 bits an update would be rounded away.
    """
    if any(is_4bit(layer.get_base_layer()) for layer in _adapted(model).values()):
        _unquantize(model)
    for name, layer in _adapted(model).items():
        layer.merge()
        model.set_submodule(name, layer.get_base_layer())
    del model.peft_config
    return model.requires_grad_(True)


def save_adapter(model: PreTrainedModel, directory: Path, base: str) -> None:
    """Write `adapter_model.safetensors` and `adapter_config.json`, for `peft.PeftModel.from_pretrained`.

    `base` is what the config calls the model that the adapter belongs to.
    """
    tensors = _tensors(model)
    saved = {PEFT_PREFIX + name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    config: LoraConfig = model.peft_config["default"]
    config.base_model_name_or_path = base
    with whole_directory(directory) as aside:
        save_file(saved, aside / "adapter_model.safetensors", metadata={"format": "pt"})
        config.save_pretrained(str(aside))


def trainable_state(module: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Of `module`'s state, what training changes: all of it without an adapter, else the updates alone."""
    if not is_attached(module):
        return state
    wanted = {name for name, parameter in module.named_parameters() if parameter.requires_grad}
    return {name: tensor for name, tensor in state.items() if name in wanted}


def parameter_counts(model: nn.Module) -> tuple[int, int]:
    """(trainable, all), tied weights once; a weight in 4 bits counts as one."""
    sizes = [(p.requires_grad, _num_weights(p)) for p in model.parameters()]
    return sum(size for trains, size in sizes if trains), sum(size for _, size in sizes)


def is_4bit(layer: nn.Module) -> bool:
    return getattr(getattr(layer, "weight", None), "quant_state", None) is not None


def _targets(model: PreTrainedModel, suffixes: tuple[str, ...]) -> dict[str, nn.Module]:
    """The layers that are adapted, by name."""
    output = model.get_output_embeddings()
    linear = {
        name: layer
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Linear | Conv1D) and layer is not output
    }
    found: dict[str, nn.Module] = {}
    for suffix in suffixes:
        chosen = {
            name: layer for name, layer in linear.items() if suffix == ALL_LINEAR or f".{name}".endswith(f".{suffix}")
        }
        if not chosen:
            known = ", ".join(sorted({name.rpartition(".")[2] for name in linear}))
            raise UserError(
                f"adapter.targets: no linear layer of {type(model).__name__} is called '{suffix}'"
                f"{' (the output layer cannot have an adapter)' if _is_output(model, output, suffix) else ''}; "
                f"choose among {known}, or {ALL_LINEAR}"
            )
        found |= chosen
    return found


def _is_output(model: nn.Module, output: nn.Module, suffix: str) -> bool:
    return any(layer is output and f".{name}".endswith(f".{suffix}") for name, layer in model.named_modules())


def _adapted(model: nn.Module) -> dict[str, Any]:
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, LoraLayer)}


def _tensors(model: PreTrainedModel) -> dict[str, Tensor]:
    """The adapter's tensors by peft's names; without a look on the hub whether the vocabulary has grown."""
    found: dict[str, Tensor] = get_peft_model_state_dict(model, adapter_name="default", save_embedding_layers=False)
    return found


def _num_weights(parameter: nn.Parameter) -> int:
    state = getattr(parameter, "quant_state", None)  # bitsandbytes packs two weights into a byte
    return int(state.shape.numel()) if state is not None else parameter.numel()


def _unquantize(model: PreTrainedModel) -> None:
    """Put the fp32 values of the 4-bit weights in their place, under the same adapter."""
    from bitsandbytes.functional import dequantize_4bit

    config, tensors = model.peft_config["default"], _tensors(model)
    for name, layer in [*_adapted(model).items()]:
        packed: Any = layer.get_base_layer()
        plain = nn.Linear(packed.in_features, packed.out_features, packed.bias is not None, packed.weight.device)
        plain.weight = nn.Parameter(dequantize_4bit(packed.weight.data, packed.weight.quant_state).float())
        if packed.bias is not None:
            plain.bias = nn.Parameter(packed.bias.float())
        model.set_submodule(name, plain)
    del model.peft_config, model.config.quantization_config, model.hf_quantizer
    model.is_quantized = model.is_loaded_in_4bit = False
    inject_adapter_in_model(config, model)
    set_peft_model_state_dict(model, tensors, adapter_name="default")
