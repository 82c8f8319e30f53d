"""From a command line to a checked config: Hydra composes, pydantic judges, every problem is told at once."""

import warnings
from collections.abc import Callable, Iterable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import cache
from itertools import product
from math import prod
from pathlib import Path
from typing import Any, Generic

from hydra import version
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.config_repository import IConfigRepository
from hydra._internal.hydra import Hydra
from hydra._internal.utils import create_config_search_path
from hydra.core.config_search_path import SearchPathQuery
from hydra.core.default_element import GroupDefault, ResultDefault
from hydra.core.hydra_config import HydraConfig
from hydra.core.object_type import ObjectType
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.types import RunMode
from omegaconf import DictConfig, ListConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException
from typing_extensions import TypeVar

from llmtrain.config.axes import Axis, Interval, Space, space_of
from llmtrain.config.base import Settings
from llmtrain.config.options import conf_directory
from llmtrain.config.origins import Origin, Origins
from llmtrain.config.preflight import CommandLine, Given, Groups, expand, read_overrides
from llmtrain.config.problems import Problem, is_valid, left_open, unheard_of, unresolvable, validate
from llmtrain.config.root import TrainConfig
from llmtrain.config.roots import ROOTS
from llmtrain.config.schema import Key, lookup, setting_at, settings, wanted
from llmtrain.config.suggest import closest, did_you_mean
from llmtrain.config.uncomposable import COMPOSITION_ERRORS, uncomposable
from llmtrain.errors import ConfigError

SEARCHES = ("tpe", "asha")
"""The kinds of `sweep` that propose points."""
MOST_CORNERS = 32
"""Combinations of options and ends that are checked before a search begins; beyond them, one axis at a time."""

Root = TypeVar("Root", bound=Settings, default=TrainConfig, covariant=True)
"""The class of a command's whole config."""


@dataclass(frozen=True)
class Checked(Generic[Root]):
    """A command line, composed and judged. Good where `problems` is empty."""

    config: Root | None
    problems: list[Problem]
    composed: DictConfig | None
    """What Hydra composed, its own node included, nothing resolved; None where it could not."""
    data: dict[str, Any]
    """The same without Hydra's node, everything resolved, without what cannot be."""
    open_keys: list[Key]
    """Settings that still hold `???`."""
    origins: Callable[[], Origins]
    """Where each setting was set, every earlier setting included; computed when first asked for."""
    root: type[Root]

    def good(self) -> Root:
        """The config. Raises ConfigError with all problems where there are any."""
        if self.problems or self.config is None:
            raise ConfigError([str(problem) for problem in self.problems])
        return self.config


def load_config(overrides: list[str], config_dirs: Sequence[Path] = (), config_name: str = "train") -> TrainConfig:
    """The config that `overrides` mean on top of `conf/train.yaml`.

    `config_dirs` are searched for options after the shipped ones, as with Hydra's `--config-dir`. Raises ConfigError
    with every problem of the command line and of the files that it chooses.
    """
    return Composer(config_dirs, config_name).check(overrides).good()


def expand_sweep(overrides: list[str], config_dirs: Sequence[Path] = (), config_name: str = "train") -> list[list[str]]:
    """The overrides of each run that `-m` asks for, all of them checked. Raises ConfigError, each problem once."""
    return [point for point, _ in load_sweep(overrides, config_dirs, config_name)]


def load_sweep(
    overrides: list[str], config_dirs: Sequence[Path] = (), config_name: str = "train"
) -> list[tuple[list[str], TrainConfig]]:
    """The overrides and the config of each run that `-m` asks for. Raises ConfigError, each problem once."""
    composer = Composer(config_dirs, config_name, files_stay=True)
    points, problems = expand(overrides, composer.groups(overrides))
    checks = [composer.check(point) for point in points]
    problems += [problem for checked in checks for problem in checked.problems]
    if problems:
        raise ConfigError(list(dict.fromkeys(map(str, problems))))
    return [(point, checked.good()) for point, checked in zip(points, checks, strict=True)]


def load_search(
    overrides: list[str], config_dirs: Sequence[Path] = (), config_name: str = "train"
) -> tuple[Space, list[tuple[list[str], TrainConfig]]] | None:
    """What `sweep=tpe` or `asha` searches, with points that have every option and every end of an interval; None where
    the sweep is a grid. Raises ConfigError, each problem once."""
    composer = Composer(config_dirs, config_name, files_stay=True)
    space, problems = space_of(overrides, composer.groups(overrides))
    shared = composer.check(list(space.fixed)).data
    if lookup(shared, ("sweep", "kind")) not in SEARCHES:
        return None
    if not space.axes and not problems:
        problems.append(Problem("sweep", "a search needs something to vary: KEY=A,B or KEY=interval(LOW,HIGH)"))
    problems += [problem for axis in space.axes if (problem := _should_be_whole(axis, shared))]
    if problems:
        space = space.model_copy(update={"axes": ()})  # what is said of the others would be half the truth
    points = [[*space.fixed, *point] for point in _corners(space)]
    checks = [composer.check(point) for point in points]
    problems += [problem for checked in checks for problem in checked.problems]
    if problems:
        raise ConfigError(list(dict.fromkeys(map(str, problems))))
    return space, [(point, checked.good()) for point, checked in zip(points, checks, strict=True)]


def _should_be_whole(axis: Axis, data: dict[str, Any]) -> Problem | None:
    if not isinstance(axis, Interval) or axis.whole or not (setting := setting_at(tuple(axis.key.split(".")), data)):
        return None
    if not wanted(setting.field).startswith("a whole number"):
        return None
    text = f"wants whole numbers; write int(interval({axis.low:g},{axis.high:g}))"
    return Problem(axis.key, text, f"override '{axis.key}=interval({axis.low:g},{axis.high:g})'")


def _corners(space: Space) -> list[tuple[str, ...]]:
    """Points that have each axis's options and ends: all combinations where they are few, else one axis at a time."""
    checks = [axis.checks for axis in space.axes]
    if prod(map(len, checks)) <= MOST_CORNERS:
        return list(product(*checks))
    first = tuple(each[0] for each in checks)
    others = [(*first[:i], one, *first[i + 1 :]) for i, each in enumerate(checks) for one in each[1:]]
    return [first, *others]


class Composer(Generic[Root]):
    """Hydra's loader over the shipped options and the user's; raises ConfigError where a directory does not exist.

    `root` is the class of the config that is composed, and says which groups there are.

    With `files_stay`, what a choice of options composes to is kept, so that points of a sweep that differ in values
    only read the files once; for as long as no file changes. `shipped` is read instead of `conf_directory()`: conf/ as
    it was in another revision.
    """

    def __init__(
        self,
        config_dirs: Sequence[Path] = (),
        config_name: str = "train",
        shipped: Path | None = None,
        *,
        files_stay: bool = False,
        root: type[Root] = TrainConfig,  # type: ignore[assignment]  # the default of its type
    ) -> None:
        self.root = root
        self._kept: dict[tuple[str, ...], tuple[DictConfig, list[tuple[Path, Key]]]] | None = {} if files_stay else None
        self._kept_groups: dict[tuple[str, ...], Groups] = {}
        version.setbase("1.3")
        search_path = create_config_search_path(str(shipped or conf_directory()))
        for directory in config_dirs:
            if not directory.is_dir():
                raise ConfigError([f"--config-dir {directory}: no such directory"])
            schema = SearchPathQuery(provider="schema")
            search_path.prepend("command-line", f"file://{directory.resolve()}", anchor=schema)
        self.config_name = config_name
        self.loader = _Loader(search_path)
        Hydra("train", self.loader)  # registers the `hydra:` resolver and the job's name

    def check(self, lines: list[str]) -> Checked[Root]:
        """Compose and judge one command line; never raises for a mistake of the user's."""
        groups = self.groups(lines)
        command_line = read_overrides(lines, groups, self.root)
        self.loader.merged = []
        composed, given = self._compose_what_is_sound(command_line, groups)
        merged = self.loader.merged
        origins = cache(lambda: _origins(merged, given))
        problems = command_line.problems
        for group in sorted(groups.chosen - groups.options.keys()):
            text = "no such group" + did_you_mean(closest(group, groups.options))
            problems.append(Problem(group, text, f"the defaults list of {self.config_name}.yaml"))
        if composed is None:
            return Checked(None, problems, None, {}, [], origins, self.root)
        data, open_keys, unresolved = plain(composed)
        if open_keys or not is_valid(data, self.root):
            _drop_what_the_old_kind_had(composed, origins(), [path for path, _ in merged], self.root)
            data, open_keys, unresolved = plain(composed)
        for one in given:
            if one.adds and any(origin.file for origin in origins().chains.get(one.key, [])):
                text = f"has a value already; write '{one.line.removeprefix('+')}' without '+'"
                problems.append(Problem(".".join(one.key), text, one.place))
        problems += [problem for key, why in unresolved if (problem := unresolvable(key, why, origins()))]
        for key in unheard_of(open_keys, data, self.root):
            open_keys.remove(key)
            lookup(data, key[:-1])[key[-1]] = "???"  # for the schema to refuse
        spoiled = {*command_line.spoiled, *open_keys, *(key for key, _ in unresolved)}
        config, found = validate(data, spoiled, origins, groups.options, self.root)
        problems += [left_open(key, data, origins(), self.root) for key in open_keys if lookup(data, key) is None]
        order = {name: position for position, name in enumerate(self.root.model_fields)}
        problems = sorted(dict.fromkeys(problems + found), key=lambda problem: order.get(problem.key.split(".")[0], -1))
        return Checked(config, problems, composed, data, open_keys, origins, self.root)

    def groups(self, lines: list[str]) -> Groups:
        """The groups and options on the search path (`hydra.searchpath=[...]` among `lines` included).

        Raises ConfigError where the search path or the defaults list cannot be read.
        """
        searchpath = [line for line in lines if line.lstrip("+").startswith("hydra.searchpath=")]
        if self._kept is None:
            return self._groups(searchpath)
        if tuple(searchpath) not in self._kept_groups:
            self._kept_groups[tuple(searchpath)] = self._groups(searchpath)
        return self._kept_groups[tuple(searchpath)]

    def _groups(self, searchpath: list[str]) -> Groups:
        try:
            with warnings.catch_warnings(action="error"):  # how Hydra tells that a directory does not exist
                _, repository = self.loader._parse_overrides_and_create_caching_repo(self.config_name, searchpath)
            primary = repository.load_config(self.config_name)
        except (*COMPOSITION_ERRORS, UserWarning) as error:
            raise ConfigError([str(uncomposable(None, error, Groups({}, {}, set())))]) from error
        if primary is None:
            raise ConfigError([f"--config-name {self.config_name}: no such file on the search path"])
        others = {name for root in ROOTS.values() for name in root.model_fields} - self.root.model_fields.keys()
        found = repository.get_group_options("", ObjectType.GROUP)
        names = [name for name in found if name != "hydra" and name not in others]
        options = {name: repository.get_group_options(name, ObjectType.CONFIG) for name in names}
        defaults = [default for default in primary.defaults_list or [] if isinstance(default, GroupDefault)]
        return Groups(
            {name: [option for option in options[name] if not option.startswith("_")] for name in names},
            {name: [option for option in options[name] if option.startswith("_")] for name in names},
            {default.group.lstrip("/") for default in defaults if default.group and not default.override},
        )

    def _compose(self, given: list[Given]) -> DictConfig:
        if self._kept is None:
            return self._load([one.composed for one in given])
        values = [one for one in given if one.composed.startswith("++") and one.key[0] != "hydra"]
        choices = tuple(one.composed for one in given if one not in values)
        if choices not in self._kept:
            self._kept[choices] = self._load(list(choices)), self.loader.merged
        base, self.loader.merged = self._kept[choices]
        composed = deepcopy(base)
        parsed = OverridesParser.create().parse_overrides([one.composed for one in values])
        self.loader._apply_overrides_to_config(parsed, composed)
        return composed

    def _load(self, lines: list[str]) -> DictConfig:
        composed: DictConfig = self.loader.load_configuration(self.config_name, lines, RunMode.RUN, from_shell=False)
        return composed

    def _compose_what_is_sound(self, line: CommandLine, groups: Groups) -> tuple[DictConfig | None, list[Given]]:
        """Leave out the choices whose files cannot be composed, and say why; None where that does not help."""
        try:
            return self._compose(line.given), line.given
        except COMPOSITION_ERRORS as error:
            whole = error
        for one in line.given:  # the only culprit is the one without which the others compose
            rest = [other for other in line.given if other is not one]
            try:
                composed = self._compose(rest)
            except COMPOSITION_ERRORS:
                continue
            line.problems.append(uncomposable(one, whole, groups))
            line.spoiled.add(one.key)
            return composed, rest
        try:
            self._compose([])
        except COMPOSITION_ERRORS as error:
            if str(error) == str(whole):  # no override is the culprit
                line.problems.append(uncomposable(None, error, groups))
                return None, line.given
        rest = line.given
        for one in line.given:  # of several, each is one that does not compose alone
            try:
                self._compose([one])
            except COMPOSITION_ERRORS as error:
                rest = [other for other in rest if other is not one]
                line.problems.append(uncomposable(one, error, groups))
                line.spoiled.add(one.key)
        try:
            return self._compose(rest), rest
        except COMPOSITION_ERRORS as error:
            line.problems.append(uncomposable(None, error, groups))
            return None, rest


class _Loader(ConfigLoaderImpl):
    """Hydra's loader, which also remembers the files that it merged last, in order, each with the key it goes under."""

    merged: list[tuple[Path, Key]]

    def _compose_config_from_defaults_list(self, defaults: list[ResultDefault], repo: IConfigRepository) -> DictConfig:
        self.merged = []
        for default in defaults:
            name = default.config_path or ""
            source = next((source for source in repo.get_sources() if source.is_config(name)), None)
            if source and source.scheme() == "file":
                package = tuple(default.package.split(".")) if default.package else ()
                self.merged.append((Path(source.path) / f"{name}.yaml", package))
        composed: DictConfig = super()._compose_config_from_defaults_list(defaults, repo)
        return composed


def _origins(merged: list[tuple[Path, Key]], given: list[Given]) -> Origins:
    origins = Origins()
    for path, package in merged:
        origins.add_file(path, package)
    for one in given:
        if one.override.package is None:
            origins.add_override(one.line, one.key, one.override.value())
            if not one.composed.startswith("++"):
                origins.add_choice(one.line, one.key[0])
    return origins


def _drop_what_the_old_kind_had(
    composed: DictConfig, origins: Origins, merged: list[Path], root: type[Settings]
) -> None:
    """Where an override or a later file chose another `kind`, remove what files had set for the kind before."""
    ranks = {path: rank for rank, path in enumerate(merged)}

    def rank(origin: Origin | None) -> int:
        return -1 if origin is None else ranks.get(origin.file, len(merged)) if origin.file else len(merged)

    data: Any = OmegaConf.to_container(composed, resolve=False)
    known = {choice for setting in settings(root) for choice in setting.kinds.items()}
    for setting in settings(root):
        chain = origins.chains.get(setting.key, [])
        if not all(origin.file for origin in chain) or setting_at(setting.key, data, root) is not None:
            continue
        if any((kind, lookup(data, tuple(kind.split(".")))) not in known for kind in setting.kinds):
            continue  # a misspelled kind takes nothing away
        kinds = [origins.last(tuple(kind.split("."))) for kind in setting.kinds]
        parent = OmegaConf.select(composed, ".".join(setting.key[:-1]), throw_on_missing=False)
        if not isinstance(parent, DictConfig) or setting.key[-1] not in parent.keys():  # noqa: SIM118  `in` denies ???
            continue
        if max(map(rank, kinds), default=-1) > max(map(rank, chain), default=-1):
            with open_dict(parent):
                del parent[setting.key[-1]]


def plain(composed: DictConfig) -> tuple[dict[str, Any], list[Key], list[tuple[Key, Exception]]]:
    """What was composed, resolved to plain data; the keys left at `???`; those that do not resolve, and why."""
    HydraConfig.instance().set_config(composed)
    open_keys: list[Key] = []
    unresolved: list[tuple[Key, Exception]] = []

    def resolve(node: DictConfig | ListConfig, key: Key) -> dict[str, Any]:
        values: dict[str, Any] = {}
        names: Iterable[Any] = node if isinstance(node, DictConfig) else range(len(node))
        for name in names:
            here = (*key, str(name))
            if here == ("hydra",):
                continue
            try:
                if OmegaConf.is_missing(node, name):
                    open_keys.append(here)
                    continue
                value = node[name]
            except OmegaConfBaseException as error:
                unresolved.append((here, error))
                continue
            if isinstance(value, DictConfig | ListConfig):
                inner = resolve(value, here)
                value = inner if isinstance(value, DictConfig) else list(inner.values())
            values[str(name)] = value
        return values

    return resolve(composed, ()), open_keys, unresolved
