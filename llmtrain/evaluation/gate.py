"""From a stored model to verdicts: the forms of it on this machine, or an endpoint that serves it."""

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import torch

from llmtrain.artifacts import OptimisedModel, ServedModel
from llmtrain.client.client import Client
from llmtrain.config.frozen import thaw
from llmtrain.data.tokenizer import load_tokenizer
from llmtrain.errors import IntegrityError, UserError
from llmtrain.evaluation.parity import Reference, Verdict
from llmtrain.evaluation.parties import Endpoint, InProcess
from llmtrain.evaluation.picture import draw
from llmtrain.evaluation.probes import rows
from llmtrain.evaluation.reference import last_checkpoint, load_quantised, runtime_scores, scores
from llmtrain.evaluation.rounding import Precision, precision_of
from llmtrain.files import write_whole
from llmtrain.models import directory as model_directory
from llmtrain.models.pretrained import read_config
from llmtrain.serving import onnx_runtime, torch_runtime
from llmtrain.serving.served import precision_of_training, serving_directory
from llmtrain.stored import StoredModel

Device = Literal["cpu", "cuda"]
Say = Callable[[str], None]
ENGINE_TIMEOUT_S = 900.0
"""A whole context, scored on a CPU beside seven others."""


@dataclass(frozen=True)
class Asking:
    """How a gate asks."""

    number: int
    """Of probes."""
    context_tokens: int | None
    """Longest probe and one token; None: what the model, or the endpoint, has room for."""
    device: Device
    """What the trained weights are computed on."""


def reference_of(stored: StoredModel, outputs: Path, asking: Asking, say: Say) -> tuple[Reference, bool]:
    """The trained weights and the training's own tokenizer; and whether they come from the last checkpoint, not from
    `model/`.

    Raises UserError where the model does not say its longest context and nobody else does.
    """
    run, tokenizer, network = stored.directory.parent, load_tokenizer(stored.directory), None
    if stored.record is not None and (run / "config.json").exists():
        trainers = outputs / thaw(run / "config.json").resolved.tokenizer_path
        tokenizer = load_tokenizer(trainers) if trainers.is_dir() else tokenizer
        network = last_checkpoint(run, outputs)
    context = asking.context_tokens or read_config(stored.directory).get("max_position_embeddings")
    if context is None:
        raise UserError(f"{stored.label} does not say its longest context; give --context-tokens")
    found = rows(tokenizer, context, asking.number)
    for reason, count in found.skipped.items():
        say(f"{count} of {asking.number} probes left out: {reason}")
    source = "its last checkpoint" if network is not None else "its model/ (no checkpoint of the last step is there)"
    say(f"{stored.label}: the trained weights are those of {source}, in fp32")
    model = (network if network is not None else model_directory.load(stored.directory)).to(asking.device)
    return Reference(model, tokenizer, found), network is not None


def gate_here(stored: StoredModel, outputs: Path, asking: Asking, say: Say) -> list[Verdict]:
    """Judge what this machine has of the model: the exported directory, PyTorch as LitServe runs it, each optimised
    form. Evidence goes beside each, a picture too.

    Raises IntegrityError where a form's files were changed.
    """
    reference, from_checkpoint = reference_of(stored, outputs, asking, say)
    parents = [stored.record.sha256] if stored.record else []
    home = outputs / "optimised" / stored.weights_sha256[:12]
    place = stored.directory.parent if stored.record else home
    tokenizer, context = load_tokenizer(stored.directory), reference.rows.context_tokens
    verdicts = []
    if from_checkpoint:
        party = InProcess("HF export", tokenizer, partial(scores, model_directory.load(stored.directory)))
        verdicts.append(reference.judge(reference.ask(party), "fp32"))
        _keep(verdicts[-1], place / "parity-trained-transformers.json", parents)
    precision = precision_of_training(stored)
    torch_model = torch_runtime.load(
        stored.directory, device="cpu", precision=precision, max_sequences=1, context_tokens=context, threads=_threads()
    )
    party = InProcess("LitServe's PyTorch", tokenizer, partial(runtime_scores, torch_model))
    verdicts.append(reference.judge(reference.ask(party), precision))
    _keep(verdicts[-1], place / "parity-trained-torch.json", parents)
    del torch_model
    for record in forms(stored, outputs):
        form = outputs / record.path
        verdicts.append(reference.judge(reference.ask(_form(record, form, context)), precision_of(record)))
        engine = "onnx" if record.form.startswith("onnx") else "transformers"
        _keep(verdicts[-1], home / f"parity-{record.form}-{engine}.json", [*parents, record.sha256])
    draw(verdicts, place / "parity.png")
    return verdicts


def gate_endpoint(
    stored: StoredModel, outputs: Path, url: str, form: str | None, asking: Asking, say: Say
) -> list[Verdict]:
    """Judge what answers at `url` against the trained weights, and one of ONNX's forms also against its own files, run
    in this process, by fp32's bounds. Evidence goes to the endpoint's directory under `outputs/serving`.

    Raises UserError where no record says what it serves, and as `Client` does where it does not answer.
    """
    with Client(url, timeout_s=ENGINE_TIMEOUT_S) as client:
        client.model = client.served()
        card = next(card for card in client.models() if card.id == client.model)
        served = served_as(client.model, stored.weights_sha256, outputs, form, card.root)
        engine = "vllm" if card.owned_by == "vllm" else "litserve"
        context = asking.context_tokens or card.max_model_len or served.context_tokens
        asking = Asking(asking.number, context, asking.device)
        reference, _ = reference_of(stored, outputs, asking, say)
        optimised = next((record for record in forms(stored, outputs) if record.form == served.form), None)
        if served.form != "trained" and optimised is None:
            raise UserError(
                f"{url} serves {served.form}, of which {outputs}/optimised has no record for {stored.label}"
            )
        precision: Precision = precision_of(optimised) if optimised else served.precision
        place = serving_directory(served, outputs)
        parents = [record.sha256 for record in (stored.record, optimised, served) if record]
        answers = reference.ask(Endpoint(f"{engine}, {served.form}", client))
        verdicts = [reference.judge(answers, precision)]
        _keep(verdicts[0], place / f"parity-{served.form}-{engine}.json", parents)
        if optimised and served.form.startswith("onnx") and precision != "fp32":
            own = _form(optimised, outputs / optimised.path, context)
            say("and against its own files, in this process")
            files = Reference(reference.model, reference.tokenizer, reference.rows, own.scores(reference.ids))
            verdicts.append(files.judge(replace(answers, party=f"{answers.party}, against its files"), "fp32"))
            _keep(verdicts[1], place / f"parity-{served.form}-{engine}-files.json", parents)
    draw(verdicts, place / "parity.png")
    return verdicts


def served_as(name: str, weights_sha256: str, outputs: Path, form: str | None, root: str | None = None) -> ServedModel:
    """The newest record of an endpoint that serves these weights as `name`, or others where none does; of `form` where
    one is given. Of several forms it is the one that lies in `root`, the directory that the endpoint says.

    Raises UserError where there is none, or several forms and nothing tells which.
    """
    paths = sorted(outputs.glob("serving/*/served.json"), key=lambda path: path.stat().st_mtime)
    records = [record for record in map(ServedModel.read, paths) if record.name == name and form in (None, record.form)]
    same = [record for record in records if record.weights_sha256 == weights_sha256]
    chosen = list({record.form: record for record in same or records}.values())
    if root is not None and len(chosen) > 1:
        place = (outputs / root).resolve()  # `root` itself where it is absolute
        chosen = [record for record in chosen if (outputs / record.path).resolve() == place] or chosen
    if not chosen:
        raise UserError(
            f"{outputs}/serving has no record of an endpoint that serves '{name}'{f' as {form}' if form else ''}; "
            f"start it by `python serve.py`, or name its outputs by --outputs"
        )
    if len(chosen) > 1:
        served = ", ".join(sorted(record.form for record in chosen))
        raise UserError(f"'{name}' was served as {served}; say which one answers: --form FORM")
    return chosen[0]


def forms(stored: StoredModel, outputs: Path) -> Iterator[OptimisedModel]:
    """Records of the forms that were made of these weights. Raises IntegrityError where their files were changed."""
    for path in sorted((outputs / "optimised" / stored.weights_sha256[:12]).glob("*/optimised.json")):
        record = OptimisedModel.read(path)
        if (file := record.damaged(outputs / record.path)) is not None:
            raise IntegrityError(f"{file} is not what was made; delete {file.parent} and run llmtrain optimise")
        yield record


def _form(record: OptimisedModel, directory: Path, context_tokens: int) -> InProcess:
    tokenizer = load_tokenizer(directory)
    if not record.form.startswith("onnx"):
        return InProcess(f"transformers, {record.form}", tokenizer, partial(scores, load_quantised(directory)))
    runtime = onnx_runtime.load(
        directory,
        providers=["CPUExecutionProvider"],
        threads=_threads(),
        max_sequences=1,
        context_tokens=context_tokens,
    )
    return InProcess(f"ONNX Runtime, {record.form}", tokenizer, partial(runtime_scores, runtime))


def _keep(verdict: Verdict, path: Path, parents: Sequence[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, verdict.evidence(parents).model_dump_json(indent=2) + "\n")


def _threads() -> int:
    return min(len(os.sched_getaffinity(0)), torch.get_num_threads())
