"""From checked configs to submitted runs: every point is frozen before the first one is handed to the engine."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from llmtrain.config.environment import Environment
from llmtrain.config.root import TrainConfig
from llmtrain.errors import UserError
from llmtrain.launch.engine import AnyLaunch, Engine, Finds, Run, State, engine_of
from llmtrain.launch.sweeps import Point, SweepDirectory, sweep_of

if TYPE_CHECKING:
    from llmtrain.artifacts import TrainedModel

Say = Callable[[str], None]
FINISHED = "version.json"
"""Of a run's directory: it is over where that is there."""


def submit(
    points: Sequence[tuple[list[str], TrainConfig]],
    *,
    again: bool = False,
    force: bool = False,
    dry_run: bool = False,
    say: Say = print,
) -> SweepDirectory:
    """Hand the runs of `points` (overrides and config) to their engine, and return; the same call again submits only
    what is neither finished nor with the engine.

    Data are prepared here, once for all points. `again` makes other runs where finished ones exist, `force` submits
    what will not fit by its plan, `dry_run` says what would be submitted and submits nothing. Raises the errors of
    `llmtrain.errors`: one of a point's comes before anything is submitted.
    """
    from llmtrain.training.run import finished, freeze

    launch = one_launch([config for _, config in points])
    environment, outputs = points[0][1].environment, Path(points[0][1].outputs_dir)
    check_policies(environment, force=force)
    runs = checked_runs(points, again=again, say=say)
    by_directory = {run.directory: run for run in runs}
    lines = [Point(overrides=tuple(o), run=relative(run, outputs)) for (o, _), run in zip(points, runs, strict=True)]
    sweep = sweep_of(launch.kind, list({point.run: point for point in lines}.values()))
    place, engine = SweepDirectory(outputs, sweep.sweep_id), engine_of(launch)
    todo = [run for directory, run in by_directory.items() if not finished(directory)]
    for directory, run in by_directory.items():
        if run not in todo:
            say(f"{directory} is finished (--again makes another run)")
    if dry_run:
        say(engine.script(place.path, todo) if todo else "nothing to submit")
        return place
    check_plans(todo)
    for run in todo:
        freeze(run.frozen, force=force)
    with place.alone():
        place.write(sweep)
        new = hand_over(place, engine, todo, say=say)
    if new < len(todo):
        say(f"{len(todo) - new} submitted before and not ended")
    say(f"sweep {sweep.sweep_id}: llmtrain jobs {sweep.sweep_id}" + elsewhere(outputs))
    return place


def checked_runs(points: Sequence[tuple[list[str], TrainConfig]], *, again: bool = False, say: Say) -> list[Run]:
    """The run of each point, its data prepared and nothing of it written. Raises the errors of `llmtrain.errors`."""
    from llmtrain.training.run import directory_of, frozen_run

    runs: list[Run] = []
    for number, (overrides, config) in enumerate(points, 1):
        try:
            frozen, _ = frozen_run(config, no_base, again=again, say=say)
            runs.append(Run(directory_of(frozen), frozen))
        except UserError as error:
            if len(points) == 1:
                raise
            raise UserError(f"point {number} of {len(points)}, {' '.join(overrides)}: {error}") from error
    return runs


def hand_over(place: SweepDirectory, engine: Engine, runs: Sequence[Run], *, say: Say, first_time: bool = False) -> int:
    """Submit those of `runs` that the engine has not already, and keep each handle; returns how many were submitted.

    A run that was handed over just before a kill, whose handle was not kept, is looked for first, unless this is the
    `first_time` that anybody submits it. The caller holds `place.alone()`.
    """
    asked = {relative(run, place.outputs) for run in runs}
    handles = {name: handle for name, handle in place.handles().items() if name in asked}
    jobs = engine.jobs(list(handles.values()))
    alive = [name for name, handle in handles.items() if jobs[handle].state not in (State.ENDED, State.UNKNOWN)]
    new = [run for run in runs if relative(run, place.outputs) not in alive]
    if new and not first_time and isinstance(engine, Finds):
        found = engine.find(place.path, new)
        for directory, handle in found.items():
            place.submitted(directory.relative_to(place.outputs).as_posix(), handle)
        new = [run for run in new if run.directory not in found]
    new = [run for run in new if not (run.directory / FINISHED).exists()]  # in the meantime
    for run, handle in engine.submit(place.path, new):
        place.submitted(relative(run, place.outputs), handle)
        say(f"submitted {run.directory} as {run.infra.launch.kind} job {handle}")
    return len(new)


def one_launch(configs: Sequence[TrainConfig]) -> AnyLaunch:
    """The `infra.launch` of all `configs`. Raises UserError where they differ: one submission goes to one engine."""
    first = configs[0]
    for config in configs:
        if config.infra.launch != first.infra.launch or config.infra.ranks != first.infra.ranks:
            raise UserError(
                "the points of a sweep differ in infra.launch or infra.ranks, which is one submission's; "
                "submit them with a command each"
            )
        if (config.outputs_dir, config.environment) != (first.outputs_dir, first.environment):
            raise UserError(
                "the points of a sweep differ in outputs_dir or environment; submit them with a command each"
            )
    return first.infra.launch


def check_policies(environment: Environment, *, force: bool) -> None:
    """Raises UserError where the environment does not let the submission pass, whatever its runs are."""
    from llmtrain.training import machine

    where = f"environment={environment.name}"
    if force and not environment.force:
        raise UserError(
            f"{where} does not let --force pass; take the overrides that the plan names, or environment=dev"
        )
    if environment.committed_code and (machine.commit() or "").endswith(machine.CHANGES):
        raise UserError(f"{where} submits committed code only, and this checkout has changes; commit or stash them")


def check_plans(runs: Sequence[Run]) -> None:
    """Raises UserError where the runs take more hours of devices, or money, by their plans than the sweep's budget or
    the environment allows. Their data are prepared."""
    config = runs[0].frozen.config if runs else None
    if config is None or not (limits := _limits(config)):
        return
    from llmtrain.plan.machine import resident_bytes
    from llmtrain.training import device
    from llmtrain.training.planned import planner
    from llmtrain.training.resolve import trained_on

    taken = {"hours": 0.0, "usd": 0.0}
    for run in runs:
        if not device.is_known(run.infra):
            raise UserError(
                f"{limits[0][0]} ({limits[0][1]}), and a plan without infra.hardware.kind=published knows nothing of "
                f"the machines of infra.launch.kind={run.infra.launch.kind}; say what they are "
                f"(conf/infra/_h100.yaml shows how), or set {limits[0][1]}=null"
            )
        outputs = Path(run.frozen.config.outputs_dir)
        data = trained_on(run.frozen, outputs)
        plan = planner(run.frozen.config, outputs, resident_bytes(), manifest=data).plan()
        taken["hours"] += (plan.eta_seconds or 0) * run.infra.ranks / 3600
        taken["usd"] += plan.cost_usd or 0
    for allows, key, limit in limits:
        unit = "usd" if key.endswith("usd") else "hours"
        if taken[unit] > limit:
            words = (
                f"cost {taken[unit]:.4g} US dollars" if unit == "usd" else f"take {taken[unit]:.4g} hours of devices"
            )
            raise UserError(
                f"{len(runs)} runs {words} by their plans, and {allows}; submit fewer, lower trainer.budget_tokens, or "
                f"raise {key}"
            )


def _limits(config: TrainConfig) -> list[tuple[str, str, float]]:
    """For each limit that is set: what allows how much, in words; its key; the number."""
    environment, sweep = config.environment, config.sweep
    limits = [
        (f"environment={environment.name} allows", "environment.device_hours", environment.device_hours),
        ("the sweep's budget is", "sweep.budget_device_hours", sweep.budget_device_hours),
        ("the sweep's budget is", "sweep.budget_usd", sweep.budget_usd),
    ]
    return [(f"{words} {limit:g}", key, limit) for words, key, limit in limits if limit is not None]


def no_base() -> "TrainedModel":
    raise UserError(
        "trainer.init_from=latest finds no model of this shape and tokenizer, and a missing base is not trained where "
        "runs are submitted; submit its pretraining first (the same command with trainer=pretrain), or name a model: "
        "trainer.init_from=NAME@VERSION"
    )


def relative(run: Run, outputs: Path) -> str:
    """A run's directory as records name it."""
    return run.directory.relative_to(outputs).as_posix()


def elsewhere(outputs: Path) -> str:
    """What a command needs to find these outputs."""
    return "" if outputs == Path("outputs") else f" --outputs {outputs}"
