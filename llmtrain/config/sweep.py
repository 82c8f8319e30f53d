"""`sweep=`: which points `-m` tries, and what they are judged by. A run computes the same in any sweep."""

from typing import Annotated, Literal

from annotated_types import Ge, Gt, MinLen
from pydantic import Discriminator

from llmtrain.config.base import Added, Changes, Settings

Metric = Annotated[str, Changes.SURFACE]
Direction = Annotated[Literal["min", "max"], Changes.SURFACE]
Trials = Annotated[int, Gt(0), Changes.SURFACE]
Seed = Annotated[int, Ge(0), Changes.SURFACE]
Seeds = Annotated[tuple[int, ...] | None, MinLen(1), Changes.SURFACE]
Budget = Annotated[float | None, Gt(0), Changes.SURFACE]


class GridSweep(Settings):
    """Every combination of the values that the command line gives."""

    kind: Annotated[Literal["grid"], Changes.SURFACE, Added(4, "grid")]
    metric: Annotated[Metric, Added(4, "validation/loss")]
    """What `llmtrain jobs collect` compares points by: a name in metrics.jsonl or of the last figures (`test/loss`)."""
    direction: Annotated[Direction, Added(4, "min")]
    """Which end of the metric is the better one."""
    budget_device_hours: Annotated[Budget, Added(4, None)]
    """Ranks x hours that all points together may take by their plans: more of them are not submitted; null is no
    limit."""
    budget_usd: Annotated[Budget, Added(4, None)]
    """The same in US dollars, by `infra.hardware.price_per_hour`; null is no limit."""


class TPESweep(Settings):
    """Proposals that learn from the points before: Optuna's tree-structured Parzen estimator. A detached process asks
    and tells; it may be killed, and goes on where it was."""

    kind: Annotated[Literal["tpe"], Changes.SURFACE]
    metric: Metric
    """What points are judged by, at their end: a name in metrics.jsonl."""
    direction: Direction
    """Which end of the metric is the better one."""
    trials: Trials
    """Points that are tried; more of them later go on with the same sweep."""
    concurrent: Trials
    """Points at the same time. With one, a seed says all proposals; with more, also which run is the faster."""
    seed: Seed
    """Of the proposals: the same command with another one is another sweep."""
    seeds: Seeds
    """`trainer.seed` of the runs that each point has, judged by their mean; null is one run, with its own seed."""
    budget_device_hours: Budget
    """Ranks x hours of training of all runs together, after which no point begins and those that run are stopped; null
    is no limit."""
    budget_usd: Budget
    """The same in US dollars, by `infra.hardware.price_per_hour`; null is no limit."""
    startup: Annotated[int, Ge(1), Changes.SURFACE]
    """Points drawn at random before the first that has learnt from others."""


class ASHASweep(Settings):
    """Random points, of which those that fall behind at a rung are stopped: asynchronous successive halving
    (Li et al. 2020, https://arxiv.org/abs/1810.05934), by Optuna's SuccessiveHalvingPruner. The process that asks and
    tells is detached; it may be killed, and goes on where it was."""

    kind: Annotated[Literal["asha"], Changes.SURFACE]
    metric: Metric
    """What points are judged by, at each rung and at their end: a name in metrics.jsonl."""
    direction: Direction
    """Which end of the metric is the better one."""
    trials: Trials
    """Points that are tried; more of them later go on with the same sweep."""
    concurrent: Trials
    """Points at the same time."""
    seed: Seed
    """Of the proposals, which depend on nothing else: the same command with another one is another sweep."""
    seeds: Seeds
    """`trainer.seed` of the runs that each point has, judged by their mean; null is one run, with its own seed."""
    budget_device_hours: Budget
    """Ranks x hours of training of all runs together, after which no point begins and those that run are stopped; null
    is no limit."""
    budget_usd: Budget
    """The same in US dollars, by `infra.hardware.price_per_hour`; null is no limit."""
    rung_tokens: Annotated[int, Gt(0), Changes.SURFACE]
    """Tokens at which points are compared for the first time, by the first evaluation from there on; the next rungs are
    `reduction`, `reduction^2`, ... times as far."""
    reduction: Annotated[int, Ge(2), Changes.SURFACE]
    """Of so many points at a rung one goes on."""


Search = TPESweep | ASHASweep
Sweep = Annotated[GridSweep | TPESweep | ASHASweep, Discriminator("kind")]
