"""`llmtrain optimise`: make another form of a model, measure it here, and keep it if it is worth having."""

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from llmtrain.artifacts import OptimisedModel
from llmtrain.config.base import Changes
from llmtrain.config.optimise import OnnxOptimise, Optimise, TorchAoOptimise
from llmtrain.data.tokenizer import load_tokenizer
from llmtrain.errors import NotBetter
from llmtrain.files import sha256_of, whole_directory, write_whole
from llmtrain.models.pretrained import read_config
from llmtrain.optimise import compare, onnx_export
from llmtrain.optimise.measure import Job, Seen, in_child
from llmtrain.optimise.picture import draw
from llmtrain.optimise.providers import available
from llmtrain.optimise.texts import pieces

RECORD, PICTURE = "optimised.json", "optimised.png"
WEIGHTS = (".safetensors", ".onnx", ".onnx.data")
Say = Callable[[str], None]


def optimise(
    source: Path,
    weights_sha256: str,
    parents: tuple[str, ...],
    outputs: Path,
    config: Optimise,
    say: Say,
    *,
    threads: int | None,
) -> OptimisedModel:
    """The model of `source` in the form that `config` says, under `outputs/optimised/<12 digits>/<form>`.

    `parents` holds the record of the source, where it has one; `threads` None: every core that the process may use. A
    form that is there with the same settings is not made again, but judged by what was measured then. One writer per
    form: callers that may race hold a lock. Raises NotBetter where the form is not worth having here: of what was just
    made nothing is left but the measurements, `<form>.refused.json`; what was there before stays.
    """
    threads = threads or len(os.sched_getaffinity(0))
    target = outputs / "optimised" / weights_sha256[:12] / config.form
    settings = _settings(config)
    known = _known(target, weights_sha256, settings)
    if known is not None and compare.decisive(config) in known.metrics:
        say(f"{target} is there already, made with the same settings")
        _judge(known.metrics, config, target, say)
        return known
    context_tokens = int(read_config(source)["max_position_embeddings"] or config.document_tokens)
    text = pieces(config, load_tokenizer(source), context_tokens, _num_calibration(config))
    with whole_directory(target) as aside:
        _copy_all_but_weights(source, aside)
        match config:
            case OnnxOptimise():
                onnx_export.export(source, aside, config, text.others, say)
                form = Job("onnx", str(aside), "fp32", available(config.providers, say), threads, (), (), 0, 0)
            case TorchAoOptimise():
                from llmtrain.optimise import torchao_weights

                say("quantising with torchao")
                torchao_weights.export(source, aside, config)
                form = Job("torchao", str(aside), "bf16", (), threads, (), (), 0, 0)
        jobs = {compare.FP32: Job("torch", str(source), "fp32", (), threads, (), (), 0, 0)}
        if _multiplies_bf16():
            jobs[compare.BF16] = replace(jobs[compare.FP32], precision="bf16")
        metrics = compare.figures(
            _measured(jobs | {compare.FORM: form}, config, text.compared, say), config.batch_sizes
        )
        say(compare.table(metrics, config, config.form))
        _judge(metrics, config, target, say)
        draw(metrics, config, config.form, aside / PICTURE)
        record = OptimisedModel(
            parents=parents,
            form=config.form,
            path=str(target.relative_to(outputs)),
            source_weights_sha256=weights_sha256,
            files={path.name: sha256_of(path) for path in sorted(aside.iterdir())},
            settings=settings,
            num_bytes=_weights_bytes(aside),
            metrics=metrics,
        )
        record.write(aside / RECORD)
    _refused(target).unlink(missing_ok=True)  # of an earlier try
    return record


def _settings(config: Optimise) -> dict[str, str | int | float | bool | None]:
    """Those that change the result; a list as text."""
    found = config.fields_that_change(Changes.MATHEMATICS)
    return {name: json.dumps(value) if isinstance(value, list) else value for name, value in found.items()}


def _known(
    target: Path, weights_sha256: str, settings: dict[str, str | int | float | bool | None]
) -> OptimisedModel | None:
    """The record at `target`, if it is of the same weights and settings, and every file is what it says."""
    if not (target / RECORD).exists():
        return None
    record = OptimisedModel.read(target / RECORD)
    same = record.source_weights_sha256 == weights_sha256 and record.settings == settings
    return record if same and record.damaged(target) is None else None


def _num_calibration(config: Optimise) -> int:
    return config.calibration_documents if isinstance(config, OnnxOptimise) else 1


def _copy_all_but_weights(source: Path, target: Path) -> None:
    """Tokenizer, chat template, configs: byte for byte, so that what is served is what was trained. Its card and the
    index of its shards stay behind."""
    for path in sorted(source.iterdir()):
        if path.is_file() and path.suffix != ".safetensors" and path.name not in (
            "README.md", "model.safetensors.index.json", "trained.json",
        ):  # fmt: skip
            shutil.copyfile(path, target / path.name)


def _measured(
    jobs: dict[str, Job], config: Optimise, documents: tuple[tuple[int, ...], ...], say: Say
) -> dict[str, compare.Party]:
    """Each in turn, `config.rounds` times, in a process of its own; the quality in the first round."""
    found: dict[str, list[Seen]] = {name: [] for name in jobs}
    for number in range(config.rounds):
        for name, job in jobs.items():
            say(f"measuring {name}, round {number + 1} of {config.rounds}")
            asked = replace(
                job,
                documents=documents if number == 0 else (),
                batch_sizes=config.batch_sizes,
                prompt_tokens=config.prompt_tokens,
                new_tokens=config.new_tokens,
            )
            found[name].append(in_child(asked))
    sizes = {name: _weights_bytes(Path(job.directory)) for name, job in jobs.items()}
    return {name: compare.Party(tuple(seen), sizes[name]) for name, seen in found.items()}


def _weights_bytes(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.iterdir() if path.name.endswith(WEIGHTS))


def _judge(metrics: dict[str, float], config: Optimise, target: Path, say: Say) -> None:
    """Raises NotBetter where there are objections; the measurements are kept beside `target` then."""
    reasons = compare.objections(metrics, config)
    if not reasons:
        return
    kept = _refused(target)
    write_whole(
        kept, json.dumps({"reasons": reasons, "settings": _settings(config), "metrics": metrics}, indent=2) + "\n"
    )
    say(f"the measurements are in {kept}")
    raise NotBetter(
        f"{config.form} is refused: " + "; ".join(reasons) + ". Choose another form (optimise=onnx_int8 loses least, "
        "optimise.rounding=gptq loses less than nearest), or allow more if the use bears it"
    )


def _refused(target: Path) -> Path:
    return target.with_name(f"{target.name}.refused.json")


def _multiplies_bf16() -> bool:
    """Whether this CPU multiplies bf16 natively; without, it is a hundred times slower than fp32."""
    has = torch.cpu.get_capabilities()
    return bool(has.get("avx512_bf16") or has.get("amx_bf16") or has.get("bf16"))
