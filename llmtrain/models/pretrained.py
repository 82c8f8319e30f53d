"""Published models: found, fetched where they are not here, refused where they could harm or cannot be read."""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from transformers import AutoConfig

from llmtrain.artifacts import weights_sha256
from llmtrain.config.base import content_hash
from llmtrain.config.model import HFModel
from llmtrain.errors import UnsupportedModel, UserError

NOT_SHAPE = {
    "_model_name_or_path", "_name_or_path", "architectures", "auto_map", "attention_dropout", "attn_dropout",
    "attn_pdrop", "bos_token_id", "dtype", "embd_pdrop", "eos_token_id", "initializer_range", "pad_token_id",
    "resid_pdrop", "torch_dtype", "transformers_version", "unk_token_id", "use_cache",
}  # fmt: skip
"""Keys of a config.json that change neither which weights fit nor what they compute without dropout."""
WANTED_FILES = ["*.json", "*.safetensors", "*.jinja", "*.txt", "*.model"]
HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


@dataclass(frozen=True)
class Published:
    """A model's directory on this machine, and what the rest of the config has to fit."""

    directory: Path
    shape_sha256: str
    vocab_size: int
    """Rows of the embedding."""
    max_position_embeddings: int | None
    """Longest context, in tokens; None where the architecture has no limit."""

    @cached_property
    def weights_sha256(self) -> str:
        """Of all its weights: seconds for each few GB, so that only who needs it waits."""
        return weights_sha256(self.directory)


def locate(model: HFModel, say: Callable[[str], None], *, fetch: bool = True) -> Path:
    """The model's directory on this machine, fetched, but not without `fetch`, where it is not here. Raises UserError
    where it cannot be had, or has no safetensors."""
    directory = _local(model) or _from_the_hub(model, say, fetch)
    check_files(directory)
    return directory


def is_on_the_hub(model: HFModel) -> bool:
    """Whether `model.path` is a hub id and not a directory here."""
    return not Path(model.path).expanduser().is_dir()


def describe(directory: Path) -> Published:
    """What is in `directory`. Raises as `read_config` does."""
    config = read_config(directory)
    return Published(
        directory,
        directory_shape_sha256(directory),
        config["vocab_size"],
        config["max_position_embeddings"],
    )


def directory_shape_sha256(directory: Path) -> str:
    """Equal for two directories that can exchange weights and then compute the same: config.json, but for dropout,
    special tokens and how it was written. Raises UserError and UnsupportedModel as `read_config` does."""
    return content_hash({key: value for key, value in read_config(directory).items() if key not in NOT_SHAPE})


def read_config(directory: Path) -> dict[str, Any]:
    """config.json with transformers' defaults, and common names for GPT-2's kin.

    Raises UserError where it is missing or damaged, UnsupportedModel where transformers does not know the architecture.
    """
    try:
        config = AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
        config = config.get_text_config()
    except (OSError, ValueError, KeyError) as error:
        path = directory / "config.json"
        if path.exists() and "auto_map" in json_of(path):
            raise UnsupportedModel(
                f"{directory} needs code that comes with it (auto_map in its config.json), and llmtrain never runs "
                f"code that comes with a model; choose one whose architecture transformers has"
            ) from error
        if path.exists() and (kind := json_of(path).get("model_type")):
            raise UnsupportedModel(
                f"{directory}: this version of transformers cannot build a model of type '{kind}': "
                f"{str(error).splitlines()[0]}"
            ) from error
        raise UserError(
            f"{directory} has no config.json that names an architecture; choose a model's directory"
        ) from error
    found: dict[str, Any] = json.loads(config.to_json_string(use_diff=False))
    for name in ("vocab_size", "max_position_embeddings"):
        found[name] = getattr(config, name, None)
    return found


def check_files(directory: Path) -> None:
    """Raises UserError unless the directory holds a whole model in safetensors."""
    if (directory / "adapter_config.json").exists():
        raise UserError(
            f"{directory} holds an adapter, not a whole model; merge it first (peft's merge_and_unload, then "
            f"save_pretrained), or choose the model/ beside it that llmtrain wrote"
        )
    if not (directory / "config.json").exists():
        raise UserError(f"{directory} has no config.json: no model is there; correct model.path")
    index = directory / "model.safetensors.index.json"
    shards = set(json_of(index).get("weight_map", {}).values()) if index.exists() else set()
    if missing := sorted(name for name in shards if not (directory / name).exists()):
        raise UserError(
            f"{directory} lacks {len(missing)} of {len(shards)} files of weights ({missing[0]}); fetch it again"
        )
    if any(directory.glob("*.safetensors")):
        return
    pickles = sorted(path.name for pattern in PICKLES for path in directory.glob(pattern))
    if pickles:
        raise UserError(
            f"{directory} has its weights as a pickle ({pickles[0]}), which can run any code when it is read; llmtrain "
            f'reads safetensors only. Where you trust its maker, convert it once: python -c "from transformers import '
            f"AutoModelForCausalLM as M; M.from_pretrained('{directory}').save_pretrained('converted')\", copy the "
            f"tokenizer's files there, and set model.path=converted"
        )
    raise UserError(f"{directory} has no *.safetensors file; restore its weights, or choose another model.path")


def _local(model: HFModel) -> Path | None:
    """The directory that `model.path` names; None where it is a hub id. Raises UserError where it is neither."""
    directory = Path(model.path).expanduser()
    if directory.is_dir():
        if model.revision is not None:
            raise UserError(
                f"model.revision={model.revision}: {directory} is a directory, which has no revisions; "
                f"set model.revision=null"
            )
        return directory
    if not HUB_ID.fullmatch(model.path):
        raise UserError(f"model.path={model.path}: no such directory, and no hub id (owner/name); correct model.path")
    return None


def _from_the_hub(model: HFModel, say: Callable[[str], None], fetch: bool) -> Path:
    """The newest snapshot of a hub id, in Hugging Face's cache; without network or `fetch`, the one that is there."""
    say(f"looking for {model.path} on the Hugging Face hub and in its cache")
    try:
        return Path(
            snapshot_download(
                model.path,
                revision=model.revision,
                allow_patterns=WANTED_FILES,
                ignore_patterns=["consolidated*", "*/*"],  # the same weights again, in other forms
                local_files_only=not fetch,
            )
        )
    except (OSError, ValueError) as error:
        revision = f" at revision {model.revision}" if model.revision else ""
        raise UserError(
            f"model.path={model.path}{revision}: there is no such directory here, it is not in Hugging Face's cache, "
            f"and the hub gave none ({type(error).__name__}: {str(error).splitlines()[0]}). Set model.path to a local "
            f"directory, or check the name, the network, HF_TOKEN (gated models) and HF_HUB_OFFLINE"
        ) from error


def json_of(path: Path) -> dict[str, Any]:
    """The object in a file; empty where it holds something else. Raises UserError where it is no JSON."""
    try:
        found = json.loads(path.read_bytes())
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({error}); restore it") from error
    return found if isinstance(found, dict) else {}
