"""What a search varies: the swept overrides of a command line as axes, from which a point's overrides are made."""

from hydra.core.override_parser.types import IntervalSweep, Override, ValueType
from pydantic import BaseModel, ConfigDict

from llmtrain.config.preflight import Groups, parse, swept
from llmtrain.config.problems import Problem

DIGITS = 6
"""Significant ones that a number between two ends is given with."""
TAGS = {"log"}


class Choices(BaseModel):
    """Values, each as it is typed."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    key: str
    values: tuple[str, ...]
    ordered: bool
    """Whether neighbours are alike, as those of `range(1,9,2)`."""

    @property
    def checks(self) -> tuple[str, ...]:
        """The overrides by which all of its points are checked."""
        return tuple(f"{self.key}={value}" for value in self.values)


class Interval(BaseModel):
    """Every number between two ends, both included."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    key: str
    low: float
    high: float
    log: bool
    """Drawn evenly by its logarithm."""
    whole: bool

    @property
    def checks(self) -> tuple[str, ...]:
        """The overrides of both ends."""
        return tuple(dict.fromkeys(f"{self.key}={self.text(end)}" for end in (self.low, self.high)))

    def text(self, value: float) -> str:
        """`value` as an override gives it: a whole number, or one of so many digits between the ends."""
        if self.whole:
            return str(int(value))
        return repr(min(max(float(f"{value:.{DIGITS}g}"), self.low), self.high))


Axis = Choices | Interval


class Space(BaseModel):
    """The overrides that all points of a search share, and the axes on which they differ."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    fixed: tuple[str, ...]
    axes: tuple[Axis, ...]

    @property
    def size(self) -> int | None:
        """How many points there are; None where an axis has no end of them."""
        size = 1
        for axis in self.axes:
            if isinstance(axis, Interval):
                if not axis.whole:
                    return None
                size *= int(axis.high) - int(axis.low) + 1
            else:
                size *= len(axis.values)
        return size


def space_of(lines: list[str], groups: Groups) -> tuple[Space, list[Problem]]:
    """The axes among the overrides `lines`, and what is wrong with them. A key given again replaces what was before."""
    fixed: dict[str, str] = {}
    axes: dict[str, Axis] = {}
    problems: list[Problem] = []
    for line in lines:
        override = parse(line)
        if isinstance(override, Problem) or not override.is_sweep_override():
            key = line if isinstance(override, Problem) else override.get_key_element()
            fixed[key] = line
            axes.pop(key, None)
            continue
        axis = _axis(override, line, groups)
        if isinstance(axis, Problem):
            problems.append(axis)
        else:
            axes[axis.key] = axis
            fixed.pop(axis.key, None)
    return Space(fixed=tuple(fixed.values()), axes=tuple(axes.values())), problems


def _axis(override: Override, line: str, groups: Groups) -> Axis | Problem:
    key, place, value = override.get_key_element(), f"override '{line}'", override.value()
    if unknown := sorted(set(getattr(value, "tags", ())) - TAGS):
        return Problem(key, f"tag '{unknown[0]}' means nothing here; write tag(log,interval(LOW,HIGH))", place)
    if override.key_or_group == "trainer.seed":
        given = ",".join(swept(override, groups)) if override.is_discrete_sweep() else "0,1,2"
        text = f"a search does not look for the best seed; write 'sweep.seeds=[{given}]': each point runs with all"
        return Problem(key, text, place)
    if override.key_or_group.split(".")[0] in ("sweep", "outputs_dir"):
        return Problem(key, "belongs to the whole sweep; give it one value", place)
    if isinstance(value, IntervalSweep):
        assert value.start is not None, "Hydra's grammar wants both ends"
        assert value.end is not None, "Hydra's grammar wants both ends"
        whole = isinstance(value.start, int) and isinstance(value.end, int)
        if not value.start < value.end:
            return Problem(key, "the interval is empty; write interval(LOW,HIGH)", place)
        log = "log" in value.tags
        if log and value.start <= 0:
            return Problem(key, "a logarithm needs a low end above 0", place)
        return Interval(key=key, low=value.start, high=value.end, log=log, whole=whole)
    values = tuple(dict.fromkeys(swept(override, groups)))
    if not values:
        return Problem(key, "the sweep has no values", place)
    return Choices(key=key, values=values, ordered=override.value_type == ValueType.RANGE_SWEEP)
