"""The command lines of `serve` and `optimise`: flags, groups, one model."""

from pathlib import Path
from typing import TypeVar

from llmtrain.cli.flags import Flag, listing, parse
from llmtrain.config.options import conf_directory, description, options
from llmtrain.config.serve import OfAModel, OptimiseConfig, ServeConfig

Config = TypeVar("Config", bound=OfAModel)
FLAGS = [
    Flag("--help", "this text", "-h"),
    Flag("--config-dir", "a directory with your own options, laid out as conf/", "-cd", "DIR"),
    Flag("--cfg", "print the composed config and stop", "-c", "job", ("job",)),
    Flag("--resolve", "with --cfg: resolve ${...}"),
]


def serve_config(argv: list[str]) -> ServeConfig | None:
    """The config of `serve`; None where the line asked for text, which is printed. Raises ConfigError."""
    usage = "python serve.py version=NAME@VERSION|run=DIRECTORY [GROUP=OPTION] [KEY=VALUE] ...   also: llmtrain serve"
    return _config(argv, ServeConfig, "serve", usage)


def optimise_config(argv: list[str]) -> OptimiseConfig | None:
    """The config of `optimise`; None where the line asked for text, which is printed. Raises ConfigError."""
    usage = "llmtrain optimise version=NAME@VERSION|run=DIRECTORY [optimise=OPTION] [KEY=VALUE] ..."
    return _config(argv, OptimiseConfig, "optimisation", usage)


def _config(argv: list[str], root: type[Config], name: str, usage: str) -> Config | None:
    flags, overrides = parse(argv, FLAGS)
    directories = [Path(flags["--config-dir"])] if "--config-dir" in flags else []
    if "--help" in flags:
        print(_help(usage, directories, root))
        return None
    from llmtrain.config.compose import Composer

    checked = Composer(directories, name, root=root).check(overrides)
    config = checked.good()
    if "--cfg" not in flags:
        return config
    from omegaconf import OmegaConf, flag_override

    assert checked.composed is not None, "a good command line was composed"
    with flag_override(checked.composed, ["struct", "readonly"], [False, False]):
        del checked.composed["hydra"]
    if "--resolve" in flags:
        OmegaConf.resolve(checked.composed)
    print(OmegaConf.to_yaml(checked.composed), end="")
    return None


def _help(usage: str, directories: list[Path], root: type[OfAModel]) -> str:
    lines = [usage, "", "Groups and their options:"]
    for group, files in options([conf_directory(), *directories]).items():
        if group in root.model_fields:
            lines += [f"  {group}="] + [f"    {name:18} {description(path)}".rstrip() for name, path in files.items()]
    return "\n".join([*lines, "", "Flags:", *listing(FLAGS), "", "What a setting means: llmtrain explain KEY"])
