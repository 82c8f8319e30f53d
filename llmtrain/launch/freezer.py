"""`python -m llmtrain.launch.freezer`: composes and freezes the points of a search, for a controller that stays light.

It reads a line of JSON for each run from its standard input, and answers with a line: the run's directory, or why there
is none. It ends with its input, and the controller lets it go when there is nothing to freeze: PyTorch is in here.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from llmtrain.config.compose import Composer
from llmtrain.errors import LLMTrainError, RunFailed, TryAgain, UserError
from llmtrain.launch.search import Searched
from llmtrain.processes import importable


class Freezer:
    """The process, started when it is needed."""

    def __init__(self, searched: Searched) -> None:
        self._asked = {
            "config_dirs": list(searched.config_dirs),
            "config_name": searched.config_name,
            "force": searched.force,
        }
        self._process: subprocess.Popen[str] | None = None

    def __call__(self, overrides: list[str]) -> Path:
        """The directory of the frozen run, absolute. Raises UserError where the config or the run cannot be, TryAgain
        where the machine has no room, RunFailed where the process has ended."""
        if self._process is None:
            with importable():
                self._process = subprocess.Popen(
                    [sys.executable, "-m", "llmtrain.launch.freezer"],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    text=True,
                )
        process = self._process
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            print(json.dumps({**self._asked, "overrides": overrides}), file=process.stdin, flush=True)
            line = process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            self.rest()
            raise RunFailed("the process that freezes points has ended; what it said stands above")
        answer = json.loads(line)
        if "run" in answer:
            return Path(answer["run"])
        raise (TryAgain if answer["code"] == TryAgain.exit_code else UserError)(answer["error"])

    def rest(self) -> None:
        """Let the process go, and its memory."""
        if self._process is not None:
            process, self._process = self._process, None
            process.communicate()


def main() -> None:
    """Answer each line until there are no more."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever is printed meanwhile is no answer
    composers: dict[str, Composer] = {}
    for line in sys.stdin:
        asked = json.loads(line)
        try:
            answer: dict[str, Any] = {"run": str(frozen(asked, composers).resolve())}
        except LLMTrainError as error:
            answer = {"error": str(error), "code": error.exit_code}
        print(json.dumps(answer), file=answers, flush=True)


def frozen(asked: dict[str, Any], composers: dict[str, Composer]) -> Path:
    """Freeze one run, as `python train.py` with these overrides would; returns its directory."""
    from llmtrain.launch.submit import checked_runs
    from llmtrain.training.run import freeze

    key = json.dumps([asked["config_dirs"], asked["config_name"]])
    if key not in composers:
        composers[key] = Composer([Path(directory) for directory in asked["config_dirs"]], asked["config_name"])
    config = composers[key].check(asked["overrides"]).good()
    [run] = checked_runs([(asked["overrides"], config)], say=lambda line: print(line, file=sys.stderr))
    freeze(run.frozen, force=asked["force"])
    return run.directory


if __name__ == "__main__":
    main()
