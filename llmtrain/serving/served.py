"""Which model a config names, and all that an engine has to know of it, from the model's own records."""

import hashlib
from pathlib import Path
from typing import Any, Literal

from llmtrain.artifacts import Form, OptimisedModel, ServedModel
from llmtrain.config.base import content_hash
from llmtrain.config.frozen import thaw
from llmtrain.config.serve import OfAModel, ServeConfig
from llmtrain.config.serving import ServingBase
from llmtrain.errors import IntegrityError, UserError
from llmtrain.models.pretrained import json_of, read_config
from llmtrain.stored import StoredModel, named, registered

OPTIONS: dict[Form, str] = {"safetensors_int8": "int8", "safetensors_int4": "int4"}
"""The option of `optimise` that makes a form, where it has another name."""


def source_of(config: OfAModel) -> StoredModel:
    """The model that `version` or `run` names, its weights hashed.

    Raises UserError where there is none, IntegrityError where the weights are not those of its record.
    """
    outputs = Path(config.outputs_dir)
    if config.version is not None:
        return registered(config.version, outputs)
    assert config.run is not None, "the config names one model"
    return named(config.run, outputs, setting="run")


def served_model(config: ServeConfig) -> tuple[ServedModel, Path]:
    """What is to be served, and the directory that an engine loads.

    Raises UserError where the model or the form of it is not there, IntegrityError where files were changed.
    """
    source, serving = source_of(config), config.serving
    directory, parents = source.directory, [source.record.sha256] if source.record else []
    if serving.form != "trained":
        optimised = _optimised(config, source, serving.form)
        directory = Path(config.outputs_dir) / optimised.path
        parents.append(optimised.sha256)
    template = _template(source.directory)
    return ServedModel(
        parents=tuple(parents),
        label=source.label,
        name=serving.name or _name(source),
        form=serving.form,
        path=_relative(directory, Path(config.outputs_dir)),
        weights_sha256=source.weights_sha256,
        precision=precision_of_training(source),
        context_tokens=_context_tokens(source, serving),
        stop_ids=_stop_ids(source.directory),
        template_sha256=None if template is None else hashlib.sha256(template.encode()).hexdigest(),
    ), directory


def serving_directory(served: ServedModel, outputs: Path) -> Path:
    """Where an endpoint keeps its record and its logs; equal models share one."""
    key = content_hash([served.weights_sha256, served.form, served.context_tokens])[:8]
    return outputs / "serving" / f"{served.name.replace('/', '-')}-{key}"


def _optimised(config: OfAModel, source: StoredModel, form: Form) -> OptimisedModel:
    """The record of that form, its files hashed."""
    directory = Path(config.outputs_dir) / "optimised" / source.weights_sha256[:12] / form
    which = f"version={config.version}" if config.version else f"run={config.run}"
    make = f"llmtrain optimise {which} optimise={OPTIONS.get(form, form)} outputs_dir={config.outputs_dir}"
    if not (directory / "optimised.json").exists():
        raise UserError(f"{source.label} has no form {form} yet; make it: {make}")
    record = OptimisedModel.read(directory / "optimised.json")
    if (file := record.damaged(directory)) is not None:
        raise IntegrityError(f"{file} is not what was made; delete {directory} and run: {make}")
    return record


def _name(source: StoredModel) -> str:
    if source.version is not None:
        return source.version.partition("@")[0]
    return source.directory.parent.parent.name if source.record else source.directory.name


def precision_of_training(source: StoredModel) -> Literal["fp32", "bf16"]:
    """What the model was trained in; of one that llmtrain did not train, what its weights are stored in."""
    if source.record is not None and (frozen := source.directory.parent / "config.json").exists():
        return "bf16" if thaw(frozen).config.infra.precision == "bf16" else "fp32"
    stored = str(read_config(source.directory).get("dtype"))
    return "bf16" if stored in ("bfloat16", "float16") else "fp32"


def _context_tokens(source: StoredModel, serving: ServingBase) -> int:
    made_for = read_config(source.directory)["max_position_embeddings"]
    wanted = serving.context_tokens
    if wanted is None and made_for is None:
        raise UserError(f"{source.label} does not say its longest context; set serving.context_tokens")
    if wanted is not None and made_for is not None and wanted > made_for:
        raise UserError(
            f"serving.context_tokens={wanted} is more than the {made_for} tokens that {source.label} was made for; "
            f"set it to {made_for} or less, or leave it out"
        )
    return int(wanted or made_for)


def _stop_ids(directory: Path) -> tuple[int, ...]:
    """Where the model's own generation config says that an answer ends."""
    for name in ("generation_config.json", "config.json"):
        path = directory / name
        found = json_of(path).get("eos_token_id") if path.exists() else None
        if found is not None:
            return tuple(sorted(found)) if isinstance(found, list) else (int(found),)
    return ()


def _template(directory: Path) -> str | None:
    """The chat template's text: a file of its own, or an entry of the tokenizer's config."""
    path = directory / "chat_template.jinja"
    if path.exists():
        return path.read_text()
    config = directory / "tokenizer_config.json"
    found: Any = json_of(config).get("chat_template") if config.exists() else None
    return found if isinstance(found, str) else None


def _relative(directory: Path, outputs: Path) -> str:
    try:
        return directory.resolve().relative_to(outputs.resolve()).as_posix()
    except ValueError:
        return str(directory)
