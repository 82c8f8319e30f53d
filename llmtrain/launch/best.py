"""The best point of a sweep as an experiment file: deltas over the default choices that make the same run again."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmtrain.config.base import Changes
from llmtrain.config.compose import Composer
from llmtrain.config.frozen import FrozenRun
from llmtrain.config.preflight import is_choice, parse
from llmtrain.config.problems import Problem
from llmtrain.config.schema import lookup
from llmtrain.config.sweep import GridSweep, Search
from llmtrain.errors import ConfigError
from llmtrain.files import write_whole
from llmtrain.launch.engine import run_in
from llmtrain.launch.search import SearchDirectory
from llmtrain.launch.sweeps import SweepDirectory

if TYPE_CHECKING:
    from llmtrain.launch.collect import Setting

NAME = "best"
GROUPS = ("model", "adapter", "trainer", "data")
"""What an experiment says; where it runs and who is told are others' to choose."""


def write_best(place: SweepDirectory, best: "Setting", sweep: GridSweep | Search) -> Path:
    """Write `conf/experiment/best.yaml` below the sweep's directory, and see that it composes to the same mathematics.

    Raises ConfigError where it does not, as where options are the user's own and lie elsewhere.
    """
    run = run_in(next(run for run in best.runs if run.state == "finished").directory)
    lines, directories = list(best.runs[0].point.overrides), []
    search = SearchDirectory(place)
    if search.exists:
        searched = search.read()
        lines = [*searched.space.fixed, *lines]
        directories = [Path(directory) for directory in searched.config_dirs]
    text = _text(run.frozen, Composer(directories), lines, best, sweep, place)
    path = place.path / "conf" / "experiment" / f"{NAME}.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, text)
    again = Composer([*directories, path.parents[1]]).check([f"experiment={NAME}"]).good()
    parts = [config.fields_that_change(Changes.MATHEMATICS, Changes.DATA) for config in (again, run.frozen.config)]
    if parts[0] != parts[1]:
        raise ConfigError([f"{path} composes to another run than {run.directory}"])
    return path


def _text(
    frozen: FrozenRun,
    composer: Composer,
    lines: list[str],
    best: "Setting",
    sweep: GridSweep | Search,
    place: SweepDirectory,
) -> str:
    import yaml

    choices = _choices(composer, lines)
    plain = composer.check([f"{group}={option}" for group, option in choices.items()]).data
    values = frozen.config.model_dump(mode="json")
    said: dict[str, Any] = {"name": frozen.config.name}
    for group in GROUPS:
        if delta := _delta(values[group], plain.get(group) or {}):
            said[group] = delta
    if frozen.resolved.parent_version and lookup(values, ("trainer", "init_from")) is not None:
        said.setdefault("trainer", {})["init_from"] = frozen.resolved.parent_version
    said["infra"] = {"precision": frozen.config.infra.precision}
    defaults = [{f"override /{group}": option} for group, option in choices.items()]
    body = yaml.safe_dump({"defaults": defaults, **said} if defaults else said, sort_keys=False, allow_unicode=True)
    error = best.standard_error
    seeds = f"mean of {len(best.figures)} seeds" if len(best.figures) > 1 else "one seed"
    figure = f"{sweep.metric} {best.mean:.4f}" + ("" if error is None else f" ± {error:.4f}") + f" ({seeds})"
    head = [
        "# @package _global_",
        f"# python train.py experiment={NAME} --config-dir {place.path / 'conf'}",
        f"# Expected: {figure}.",
        f"# The best of sweep {place.path.name}: {' '.join(f'{key}={value}' for key, value in best.values.items())}",
    ]
    return "\n".join(head) + "\n" + body


def _choices(composer: Composer, lines: list[str]) -> dict[str, str]:
    """The options of the groups that an experiment says, as the command line chose them; those of an experiment that it
    was itself one of are in there."""
    checked = composer.check(lines)
    checked.good()
    assert checked.composed is not None, "a good command line was composed"
    chosen, default = checked.composed.hydra.runtime.choices, composer.check([]).composed
    assert default is not None, "the default choices compose"
    groups = composer.groups(lines)
    named = [one for line in lines if not isinstance(one := parse(line), Problem) and is_choice(one, groups)]
    typed = {one.key_or_group for one in named}
    return {
        group: str(chosen[group])
        for group in GROUPS
        if chosen.get(group) and (group in typed or chosen[group] != default.hydra.runtime.choices.get(group))
    }


def _delta(values: dict[str, Any], plain: dict[str, Any]) -> dict[str, Any]:
    """What of `values` is not so in `plain`; a group of another kind as a whole."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        before = plain.get(name)
        if isinstance(value, dict) and isinstance(before, dict) and value.get("kind") == before.get("kind"):
            if inner := _delta(value, before):
                found[name] = inner
        elif value != before or name not in plain:
            found[name] = value
    return found
