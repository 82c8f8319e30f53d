"""`torchrun rank_driver.py PLAN`: several frozen runs, one after the other, on the same ranks.

Starting a process costs more than a small run. PLAN is a JSON list of {directory, stop: [rank, step] or null}: at that
step, that rank alone is sent SIGTERM. What each run ended with is printed by rank 0 to a file beside the plan.
"""

import json
import os
import signal
import sys
import warnings
from pathlib import Path
from typing import Any

import torch.distributed as dist

from llmtrain.config.frozen import thaw
from llmtrain.errors import LLMTrainError
from llmtrain.training.events import Between
from llmtrain.training.ranks import group
from llmtrain.training.run import train_rank


def stop_at(rank: int, step: int) -> None:
    """Send this process SIGTERM when it has done `step` steps, if it is `rank`."""

    def after_step(self: Between, trainer: Any, module: Any, *rest: Any) -> None:
        if dist.get_rank() == rank and module.step == step:
            os.kill(os.getpid(), signal.SIGTERM)
        undisturbed(self, trainer, module, *rest)

    Between.on_train_batch_end = after_step  # type: ignore[method-assign]


undisturbed = Between.on_train_batch_end


def main(plan: Path) -> None:
    warnings.simplefilter("ignore")
    entries = json.loads(plan.read_text())
    group.Ranks.leave = lambda self: None  # type: ignore[method-assign]  # not before the last run
    group.join(thaw(Path(entries[0]["directory"]) / "config.json").config.infra)
    ended = []
    for entry in entries:
        Between.on_train_batch_end = undisturbed  # type: ignore[method-assign]
        if entry["stop"]:
            stop_at(*entry["stop"])
        try:
            train_rank(Path(entry["directory"]))
            ended.append("done")
        except LLMTrainError as error:
            ended.append(f"{type(error).__name__}: {error}")
    if dist.get_rank() == 0:
        plan.with_suffix(".ended").write_text(json.dumps(ended))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    sys.stdout.flush()
    os._exit(0)
