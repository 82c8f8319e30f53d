"""What happens between two steps: metrics, evaluation, checkpoints, and the wish to stop.

The order is fixed (measure, evaluate, write the row, save), and a checkpoint holds the size of `metrics.jsonl`, so that
a resumed run cuts away the rows that it will write again: the file ends up as if nothing had happened. All ranks come
to the same decisions; rank 0 alone writes, but for checkpoints, which all write together.
"""

import signal
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType
from typing import Any

import lightning

from llmtrain.config.trainer import Trainer
from llmtrain.processes import STOPS
from llmtrain.telemetry.metrics import MetricsFile
from llmtrain.telemetry.progress import Progress
from llmtrain.telemetry.stopwatch import Stopwatch
from llmtrain.telemetry.tracking import Tracker
from llmtrain.training import checkpoints
from llmtrain.training.batches import StepBatch
from llmtrain.training.module import TokenClock
from llmtrain.training.origin import SICKNESS_FILE
from llmtrain.training.pulse import Pulse
from llmtrain.training.ranks.alone import Alone
from llmtrain.training.schedule import due


class Between(lightning.Callback):
    """The events of one run. `evaluate` returns the validation figures, with a `loss` to choose the best by; `report`
    shows how things stand, once they are saved."""

    def __init__(
        self,
        settings: Trainer,
        directory: Path,
        evaluate: Callable[[], dict[str, float]],
        metrics: MetricsFile,
        tracker: Tracker,
        progress: Progress,
        stopwatch: Stopwatch,
        report: Callable[[], None],
        ranks: Alone,
    ) -> None:
        self.settings, self.checkpoints, self.evaluate = settings, directory / "checkpoints", evaluate
        self.metrics, self.tracker, self.progress = metrics, tracker, progress
        self.stopwatch, self.report, self.ranks = stopwatch, report, ranks
        self.pulse = Pulse(directory, stopwatch, writes=ranks.rank == 0)
        self.best: dict[str, float] | None = None
        self.stopped_by: signal.Signals | None = None
        self.seconds = 0.0  # trained before this process, of the same run
        self.row_tokens, self.row_seconds = 0, 0.0  # trained in this process since the last row: what the speed is of
        self._since_row: list[dict[str, float]] = []

    # ---- stopping: a handler only sets a flag; the state is saved at the next step's boundary

    def on_train_start(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
        for number in STOPS:
            signal.signal(number, self._stop)
        self.started = time.monotonic() - self.seconds
        self.step_started = time.monotonic()
        self.pulse.start()
        module.before_update = self.pulse.updates

    def _stop(self, number: int, frame: FrameType | None) -> None:
        if self.stopped_by not in (None, signal.SIGUSR2):  # asked twice: at once, without saving
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        first, self.stopped_by = self.stopped_by is None, signal.Signals(number)
        if first and self.ranks.rank == 0:
            print(f"\n{self.stopped_by.name}: stopping after this step; again to stop at once", file=sys.stderr)

    def agreed_to_stop(self) -> signal.Signals | None:
        """The signal that stops the run, whichever rank it reached; all ranks ask at the same place."""
        asked = self.ranks.largest(self.stopped_by or 0)
        return signal.Signals(asked) if asked else None

    def on_exception(
        self, trainer: lightning.Trainer, module: lightning.LightningModule, exception: BaseException
    ) -> None:
        assert isinstance(module, TokenClock)
        self.pulse.leave()
        if module.sickness and self.ranks.rank == 0:
            module.sickness.write(self.checkpoints.with_name(SICKNESS_FILE))

    # ---- between two steps

    def on_train_batch_start(
        self, trainer: lightning.Trainer, module: lightning.LightningModule, batch: StepBatch, _: int
    ) -> None:
        self.pulse.begins(waiting_since=self.step_started)

    def on_train_batch_end(
        self, trainer: lightning.Trainer, module: lightning.LightningModule, outputs: Any, batch: StepBatch, _: int
    ) -> None:
        assert isinstance(module, TokenClock)
        self._since_row.append(module.figures)
        self.pulse.ends(module.figures["loss"], module.figures["grad_norm"])
        before, after = module.tokens - batch.num_tokens, module.tokens
        self.row_tokens += batch.num_tokens
        self.row_seconds += max(0.0, time.monotonic() - self.step_started)  # clocks jump
        last = after >= module.total_tokens
        self.progress.update(after, loss=module.figures["loss"])

        row: dict[str, float] = {}
        if last or due(before, after, self.settings.log_every_tokens):
            row |= self._training_figures()
        improved = False
        evaluated = last or due(before, after, self.settings.evaluate_every_tokens)
        if evaluated:
            found = self.evaluate()
            row |= {f"validation/{name}": value for name, value in found.items()}
            improved = self.best is None or found["loss"] < self.best["loss"]
            if improved:
                self.best = {"loss": found["loss"], "step": module.step}
        if "train/loss" in row:
            self.pulse.write(module.step, module.tokens)
        if row:
            self._write(module, row)
        stopping = self.agreed_to_stop()
        if last or improved or stopping or due(before, after, self.settings.checkpoint_every_tokens):
            with self.stopwatch.phase("checkpoints"):
                self.save(trainer, module)
        if evaluated or stopping:
            self.report()
        if stopping:
            trainer.should_stop = True
        self.step_started = time.monotonic()

    def _training_figures(self) -> dict[str, float]:
        """Means over the steps since the last row."""
        steps, self._since_row = self._since_row, []
        speed = self.row_tokens / self.row_seconds if self.row_seconds else 0.0
        self.row_tokens, self.row_seconds = 0, 0.0
        return {
            "train/loss": sum(step["loss"] for step in steps) / len(steps),
            "train/grad_norm": sum(step["grad_norm"] for step in steps) / len(steps),
            "train/lr": steps[-1]["lr"],
            "train/tokens_per_second": speed,
        }

    def _seconds(self) -> float:
        return max(0.0, time.monotonic() - self.started)

    def _write(self, module: TokenClock, figures: dict[str, float]) -> None:
        if self.ranks.rank:
            return
        now = datetime.now(UTC).isoformat(timespec="seconds")
        place = {"step": module.step, "tokens": module.tokens}
        self.metrics.append({**place, "time_utc": now, "seconds": round(self._seconds(), 3), **figures})
        self.tracker.log(module.step, {"tokens": module.tokens, **figures})

    def save(self, trainer: lightning.Trainer, module: TokenClock) -> None:
        """Write the checkpoint of the step just done."""
        trainer.save_checkpoint(self.checkpoints / f"step-{module.step:08d}", weights_only=False)
        self.tidy()

    def tidy(self) -> None:
        """Point `best` at the best checkpoint, remove those that are no longer needed."""
        if self.ranks.rank:
            return
        if self.best is not None:
            checkpoints.mark_best(self.checkpoints / f"step-{int(self.best['step']):08d}")
        checkpoints.prune(self.checkpoints)

    # ---- what a resumed run needs

    def on_save_checkpoint(
        self, trainer: lightning.Trainer, module: lightning.LightningModule, checkpoint: Any
    ) -> None:
        checkpoint["between"] = {
            "best": self.best,
            "metrics_bytes": 0 if self.ranks.rank else self.metrics.size,
            "since_row": self._since_row,
            "seconds": self._seconds(),
            "pulse": self.pulse.state(),
        }

    def on_load_checkpoint(
        self, trainer: lightning.Trainer, module: lightning.LightningModule, checkpoint: Any
    ) -> None:
        state = checkpoint["between"]
        self.best, self._since_row, self.seconds = state["best"], state["since_row"], state["seconds"]
        self.pulse.restore(state.get("pulse"))
        if self.ranks.rank == 0:
            self.metrics.truncate(state["metrics_bytes"])
