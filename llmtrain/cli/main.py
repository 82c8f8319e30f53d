"""`llmtrain COMMAND ...`"""

import sys
from importlib import import_module

from llmtrain import __version__
from llmtrain.cli import UsageError, exits
from llmtrain.config.suggest import closest, did_you_mean

COMMANDS = {
    "train": "train a model: python train.py, under another name",
    "check": "validate every option and experiment, or one command line, without running it",
    "explain": "what a setting means, what it may be, and which file or override set it",
    "models": "list the registered models, show one, check its files",
    "diff": "what differs between two runs, two revisions of conf/ or two command lines, and what it changes",
    "plan": "memory, time, energy and cost of a command line, before anything is launched",
    "jobs": "list what was submitted, follow its logs, wait for it, cancel it, compare its results",
    "rerun": "a run once more, from its directory alone, and whether the result is bit-equal",
    "optimise": "another form of a model, ONNX or quantised, measured here and kept where it is worth it",
    "serve": "serve a model: python serve.py, under another name",
    "parity": "is what an endpoint serves the model that was trained?",
    "chat": "a page to talk to one endpoint, or to compare two",
    "doctor": "why a run is slow or sick, and the override that helps",
    "demo": "the whole flow on two CPU cores, in a few minutes",
}
"""Each is a module of this package with a `main(argv)`."""


@exits
def main(argv: list[str] | None = None) -> int:
    """Hand the command line to its command; the exit codes are those of `llmtrain.errors`."""
    command, *rest = (sys.argv[1:] if argv is None else argv) or ["--help"]
    if command in ("-h", "--help"):
        print("llmtrain COMMAND ...\n\nCommands (each has its own --help):")
        print("\n".join(f"  {name:8} {line}" for name, line in COMMANDS.items()))
        return 0
    if command == "--version":
        print(f"llmtrain {__version__}")
        return 0
    if command not in COMMANDS:
        what = "flag" if command.startswith("-") else "command"
        guess = did_you_mean(closest(command, COMMANDS))
        raise UsageError(f"{command}: no such {what}{guess}; the commands are {', '.join(COMMANDS)}")
    code: int = import_module(f"llmtrain.cli.{command}").main(rest)
    return code
