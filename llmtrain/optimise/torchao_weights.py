"""Safetensors with quantised weights, by torchao: what transformers and vLLM load. The embedding and the output layer
stay as they are."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from llmtrain.config.optimise import TorchAoOptimise
from llmtrain.errors import IntegrityError, UserError


def export(source: Path, target: Path, config: TorchAoOptimise) -> None:
    """Write config.json and safetensors in bf16 and integers into `target`, and load them back to compare.

    Raises UserError where torchao is missing or cannot store such weights here, IntegrityError where what was read back
    computes something else.
    """
    model = _from_pretrained(source, quantization_config=_how(config))
    model.save_pretrained(target)
    ids = (torch.arange(32) * 7919 % model.config.vocab_size)[None]
    with torch.inference_mode():
        if not torch.equal(model(ids).logits, load(target, torch.get_num_threads())(ids).logits):
            raise IntegrityError(f"{target}: read back, the quantised model has other logits than the one written")


def load(directory: Path, threads: int) -> PreTrainedModel:
    """A model that `export` wrote, in evaluation mode. `threads` is set for this process."""
    torch.set_num_threads(threads)
    return _from_pretrained(directory)


def _from_pretrained(directory: Path, **options: Any) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        directory,
        dtype=torch.bfloat16,
        attn_implementation="sdpa",
        local_files_only=True,
        use_safetensors=True,
        trust_remote_code=False,
        **options,
    )
    return model.eval()


def _how(config: TorchAoOptimise) -> Any:
    try:
        from torchao.quantization import Int4WeightOnlyConfig, Int8WeightOnlyConfig, PerGroup, PerRow
    except ImportError as error:
        raise UserError("optimise.kind=torchao needs torchao: run `pip install 'llmtrain[quantise]'`") from error
    from transformers import TorchAoConfig

    match config.form:
        case "safetensors_int8":
            granularity = PerRow() if config.block_size is None else PerGroup(config.block_size)
            return TorchAoConfig(Int8WeightOnlyConfig(granularity=granularity))
        case "safetensors_int4":
            if not torch.cuda.is_available():
                raise UserError(
                    "optimise=int4 needs CUDA: torchao packs 4 bits for a GPU's kernels (package mslk-cuda). Run it on "
                    "a CUDA host, or choose optimise=int8, or optimise=onnx_int4 for CPUs"
                )
            return TorchAoConfig(Int4WeightOnlyConfig(group_size=config.block_size))
