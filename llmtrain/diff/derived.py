"""What follows from a config: how many steps of how many tokens, the learning rate along the way, parameters, FLOPs.

Counting parameters and FLOPs traces the network, which takes some seconds to import: only where they can differ.
"""

from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from llmtrain.artifacts import DatasetManifest
from llmtrain.config.compare import Side
from llmtrain.config.root import TrainConfig
from llmtrain.config.trainer import DistillTrainer, PretrainTrainer
from llmtrain.errors import IntegrityError, UserError
from llmtrain.plan.workload import estimated
from llmtrain.training.schedule import learning_rate

POINTS = tuple(tenth / 10 for tenth in range(1, 11))
"""Shares of a run at which the learning rate is given."""


class Quantity(BaseModel):
    """A figure that is not the same on both sides; null where it depends on data that are not prepared."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    name: str
    before: float | int | tuple[float, ...] | None
    after: float | int | tuple[float, ...] | None


class Derived(BaseModel):
    """The figures that differ, and why others are missing."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    quantities: tuple[Quantity, ...]
    not_counted: str | None
    """Why parameters and FLOPs could not be counted; null where they were, or where they do not differ"""


def derived(before: Side, after: Side) -> Derived:
    """The quantities that differ between two sides."""
    sides = [(side, manifest_of(side)) for side in (before, after)]
    old, new = (quick(side.config, manifest) for side, manifest in sides)
    not_counted = None
    if len({repr(_what_is_counted(side.config, manifest)) for side, manifest in sides}) > 1:
        try:
            more = [counted(side.config, manifest, outputs_of(side)) for side, manifest in sides]
            old, new = old | more[0], new | more[1]
        except (UserError, OSError) as error:  # a published model that is not here
            not_counted = str(error)
    found = [Quantity(name=name, before=old[name], after=new[name]) for name in old if old[name] != new[name]]
    return Derived(quantities=tuple(found), not_counted=not_counted)


def quick(config: TrainConfig, manifest: DatasetManifest | None) -> dict[str, Any]:
    """Steps, tokens and the schedule by name: what needs no network. Tuning's are null before its data are prepared."""
    match config.trainer:
        case PretrainTrainer() | DistillTrainer() as trainer:  # exact: the clock counts rows as full
            step_tokens = trainer.batch_rows * trainer.sequence_tokens
            steps = trainer.budget_tokens // step_tokens
            figures: list[int | None] = [step_tokens, steps, steps * step_tokens]
        case _ if manifest is None:
            figures = [None, None, None]
        case _:
            whole = estimated(_in_one_piece(config), manifest)
            figures = [round(whole.tokens_per_step), whole.num_steps, whole.num_tokens]
    step_tokens_or_none, steps_or_none, tokens = figures
    return {
        "tokens per step": step_tokens_or_none,
        "steps": steps_or_none,
        "tokens": tokens,
        "learning rate": None if tokens is None else learning_rates(config, tokens),
    }


def learning_rates(config: TrainConfig, total_tokens: int) -> tuple[float, ...]:
    """At each of `POINTS` of a run of `total_tokens`."""
    trainer = config.trainer
    return tuple(
        learning_rate(
            round(share * total_tokens),
            peak=trainer.lr,
            warmup_tokens=trainer.warmup_tokens,
            total_tokens=total_tokens,
            min_share=trainer.min_lr_share,
            schedule=trainer.schedule,
            decay_share=trainer.decay_share,
        )
        for share in POINTS
    )


def counted(config: TrainConfig, manifest: DatasetManifest | None, outputs: Path) -> dict[str, Any]:
    """Parameters and FLOPs by name, of the whole run under both conventions.

    Raises UserError or OSError where a published model cannot be read.
    """
    from llmtrain.training.planned import planner

    found = planner(config, outputs, baseline_bytes=0, manifest=manifest)
    return {
        "parameters": found.step.num_parameters,
        "trained parameters": found.step.num_trained,
        "FLOPs, causal half": found.total_flops("half"),
        "FLOPs, causal in full": found.total_flops("full"),
    }


def manifest_of(side: Side) -> DatasetManifest | None:
    """What a run's data hold, where they are still there."""
    if side.run is None:
        return None
    resolved = side.run.resolved
    path = resolved.pairs_path or resolved.chats_path or resolved.text_path
    try:
        return DatasetManifest.read(outputs_of(side) / path / "manifest.json")
    except (OSError, IntegrityError):
        return None


def outputs_of(side: Side) -> Path:
    """The outputs directory: a run's own, wherever it was moved, else the config's."""
    return Path(side.name).resolve().parents[1] if side.run else Path(side.config.outputs_dir)


def _what_is_counted(config: TrainConfig, manifest: DatasetManifest | None) -> tuple[object, ...]:
    """Where it is equal, so are parameters and FLOPs: a step is taken in one piece, on one rank."""
    return config.model, config.adapter, config.trainer.kind, estimated(_in_one_piece(config), manifest)


def _in_one_piece(config: TrainConfig) -> TrainConfig:
    """The same with each step in one micro-batch on one rank."""
    infra = config.infra.model_copy(update={"ranks": 1, "micro_batch_tokens": 2**62})
    return config.model_copy(update={"infra": infra})
