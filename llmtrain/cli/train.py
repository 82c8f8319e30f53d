"""`llmtrain train`, and `python train.py`: check the command line, then run what it describes.

Exit codes are those of `llmtrain.errors`. A sweep (`-m`) goes on past a point that fails and ends with the gravest code
of its points: 3 (a run failed) before 2 (the user's mistake). It stops where the machine stops it: Ctrl-C (130), and
75 for a signal to end or a full disk; the same command goes on from there, because finished runs are not run again.
With `infra=slurm|ray|aks`, or `--detach`, runs are submitted and the command returns: `llmtrain jobs` follows them.
So it does with `sweep=tpe|asha`, whose points a process of its own proposes.
"""

import gc
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmtrain import __version__
from llmtrain.cli import UsageError, exits
from llmtrain.cli.completion import answer
from llmtrain.cli.flags import Flag, listing, parse
from llmtrain.config.options import conf_directory, description, options
from llmtrain.errors import Interrupted, LLMTrainError, TryAgain

if TYPE_CHECKING:
    from llmtrain.config.axes import Space
    from llmtrain.config.root import TrainConfig

FLAGS = [
    Flag("--help", "this text", "-h"),
    Flag("--version", "the versions of llmtrain and Hydra"),
    Flag("--again", "make a new run although a finished one exists"),
    Flag("--force", "begin a run that will not fit into memory by its plan"),
    Flag("--detach", "leave the runs to processes of their own and return; infra=slurm, ray and aks always do"),
    Flag("--dry-run", "print what would be submitted: the sbatch script, the Ray job, the manifest"),
    Flag("--multirun", "a sweep: KEY=A,B runs once for each value", "-m"),
    Flag("--config-dir", "a directory with your own options, laid out as conf/", "-cd", "DIR"),
    Flag("--config-name", "another defaults list than train", "-cn", "NAME"),
    Flag("--cfg", "print the composed config and stop", "-c", "job|hydra|all", ("job", "hydra", "all")),
    Flag("--package", "with --cfg: only this part of it", "-p", "KEY"),
    Flag("--resolve", "with --cfg: resolve ${...}"),
    Flag(
        "--info",
        "what Hydra sees; alone, everything",
        "-i",
        "[defaults|searchpath|...]",
        ("all", "config", "defaults", "defaults-tree", "plugins", "searchpath"),
        default="all",
    ),
    Flag("--run", "run (the default)", "-r"),
    Flag("--shell-completion", "install=SHELL or uninstall=SHELL (bash, zsh, fish)", "-sc"),
    Flag("--hydra-help", "Hydra's own help"),
]
NOT_OURS = ("optimise", "serving")
"""Groups of conf/ that other commands compose."""


@exits
def main(argv: list[str] | None = None) -> int:
    """Train what the command line describes, or print what it asks for."""
    flags, overrides = parse(sys.argv[1:] if argv is None else argv, FLAGS)
    directories = [Path(flags["--config-dir"])] if "--config-dir" in flags else []
    modes = [name for name in ("--run", "--multirun", "--cfg", "--info", "--shell-completion") if name in flags]
    if len(modes) > 1:
        raise UsageError(f"{' and '.join(modes)} exclude each other")
    if "--cfg" not in flags and (alone := [name for name in ("--package", "--resolve") if name in flags]):
        raise UsageError(f"{alone[0]} goes with --cfg job|hydra|all")
    if "--help" in flags:
        print(help_text(directories))
    elif "--version" in flags:
        from importlib.metadata import version

        print(f"llmtrain {__version__}\nHydra {version('hydra-core')}")
    elif "--shell-completion" in flags and (text := answer(overrides)) is not None:
        print(text)
    elif "--shell-completion" in flags or "--hydra-help" in flags:
        _ask_hydra(flags, overrides)
    elif "--cfg" in flags or "--info" in flags:
        with _quick_start():
            _show(flags, overrides, directories)
    else:
        return _run(flags, overrides, directories)
    return 0


@contextmanager
def _quick_start() -> Iterator[None]:
    """Without garbage collection: what imports make stays, and looking at it is a twentieth of the time to compose."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def help_text(directories: list[Path]) -> str:
    """Usage, the options of each group with the first line of their files, and the flags."""
    lines = [
        "python train.py [FLAG] [GROUP=OPTION] [KEY=VALUE] ...     also: llmtrain train ...",
        "",
        "Groups and their options:",
    ]
    for group, files in options([conf_directory(), *directories]).items():
        if group in NOT_OURS:
            continue
        lines += [f"  {group}="] + [f"    {name:18} {description(path)}".rstrip() for name, path in files.items()]
    lines += ["", "Flags:", *listing(FLAGS), "", "Every setting and its value: python train.py --cfg job"]
    return "\n".join([*lines, "What each one means, and which file or override set it: llmtrain explain KEY"])


def _show(flags: dict[str, str], overrides: list[str], directories: list[Path]) -> None:
    """`--cfg` and `--info`, once the command line is known to be good."""
    from llmtrain.config.compose import Composer

    name = flags.get("--config-name", "train")
    checked = Composer(directories, name).check(overrides)
    checked.good()
    if flags.get("--cfg") != "job":
        _ask_hydra(flags, overrides)
        return
    from omegaconf import Container, OmegaConf, flag_override

    assert checked.composed is not None, "a good command line was composed"
    config = checked.composed
    with flag_override(config, ["struct", "readonly"], [False, False]):
        del config["hydra"]
    package = flags.get("--package", "_global_")
    part = config if package == "_global_" else OmegaConf.select(config, package)
    if part is None:
        raise UsageError(f"--package {package}: the config has no such part")
    if not isinstance(part, Container):
        print(part)
        return
    if package != "_global_":
        print(f"# @package {package}")
    if "--resolve" in flags:
        OmegaConf.resolve(part)
    print(OmegaConf.to_yaml(part), end="")


def _ask_hydra(flags: dict[str, str], overrides: list[str]) -> None:
    """Let Hydra's own command line answer."""
    import hydra

    passed = [name if value == name else f"{name}={value}" for name, value in flags.items()]
    argv = sys.argv
    sys.argv = [argv[0], *passed, *overrides]
    try:
        hydra.main(version_base="1.3", config_path=str(conf_directory()), config_name="train")(_nothing)()
    finally:
        sys.argv = argv


def _nothing(config: Any) -> None:
    raise AssertionError("Hydra shows configs here and runs nothing")


def _run(flags: dict[str, str], overrides: list[str], directories: list[Path]) -> int:
    name = flags.get("--config-name", "train")
    with _quick_start():
        from llmtrain.config.compose import load_config, load_search, load_sweep

        if "--multirun" in flags and (found := load_search(overrides, directories, name)):
            return _search(flags, *found, directories, name)
        if "--multirun" in flags:
            points = load_sweep(overrides, directories, name)
        else:
            points = [(overrides, load_config(overrides, directories, name))]
    if (kind := points[0][1].sweep.kind) != "grid":
        raise UsageError(f"sweep={kind} proposes points: add -m, and what to vary: KEY=interval(LOW,HIGH) or KEY=A,B")
    if "--detach" in flags or "--dry-run" in flags or points[0][1].infra.launch.kind != "local":
        from llmtrain.launch.submit import submit

        submit(points, again="--again" in flags, force="--force" in flags, dry_run="--dry-run" in flags)
        return 0
    if limits := [name for name in ("budget_device_hours", "budget_usd") if getattr(points[0][1].sweep, name)]:
        raise UsageError(f"sweep.{limits[0]} of a grid is held against its plans when it is submitted: add --detach")
    from llmtrain.training.run import train  # seconds of imports: only once the config is known to be good

    if len(points) == 1:
        [(_, config)] = points
        train(
            config, base_config=base_of(config, directories, name), again="--again" in flags, force="--force" in flags
        )
        return 0
    failures: list[tuple[str, int]] = []
    for number, (point, config) in enumerate(points, 1):
        header = f"[{number}/{len(points)}] {' '.join(point)}"
        print(header, flush=True)
        try:
            train(
                config,
                base_config=base_of(config, directories, name),
                again="--again" in flags,
                force="--force" in flags,
            )
        except (Interrupted, TryAgain):
            raise
        except LLMTrainError as error:
            print(error, file=sys.stderr)
            failures.append((header, error.exit_code))
    for header, code in failures:
        print(f"failed with exit code {code}: {header}", file=sys.stderr)
    return max((code for _, code in failures), default=0)


def _search(
    flags: dict[str, str],
    space: "Space",
    points: "list[tuple[list[str], TrainConfig]]",
    directories: list[Path],
    name: str,
) -> int:
    """Leave a search to its controller."""
    if "--again" in flags:
        raise UsageError("--again goes with runs and grids; another sweep.seed makes another search")
    from llmtrain.launch.searching import submit_search

    submit_search(
        space,
        points,
        config_dirs=directories,
        config_name=name,
        force="--force" in flags,
        dry_run="--dry-run" in flags,
    )
    return 0


def base_of(config: "TrainConfig", directories: list[Path], name: str) -> "Callable[[], TrainConfig]":
    """How to compose the pretraining that `trainer.init_from=latest` needs where nothing is registered.

    The same model, corpus, machine, tracker and outputs directory as `config`, with the default pretraining; the call
    raises ConfigError where those do not fit together.
    """

    def compose() -> "TrainConfig":
        import json

        from pydantic import ValidationError

        from llmtrain.config.compose import load_config
        from llmtrain.config.data import TextData
        from llmtrain.config.root import TrainConfig
        from llmtrain.errors import ConfigError

        base = load_config(["trainer=pretrain", f"model.name={json.dumps(config.model.name)}"], directories, name)
        kept = {field: getattr(config, field) for field in ("model", "infra", "tracking", "outputs_dir")}
        data = config.data if isinstance(config.data, TextData) else config.data.text()
        try:
            return TrainConfig.model_validate({**dict(base), **kept, "data": data})
        except ValidationError as error:
            where = "the pretraining that trainer.init_from=latest needs"
            reasons = [details["msg"].removeprefix("Value error, ") for details in error.errors()]
            raise ConfigError(
                [f"{where}: {reason}; or name a model: trainer.init_from=NAME@VERSION" for reason in reasons]
            ) from error

    return compose
