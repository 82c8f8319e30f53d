"""What training takes, step by step, held against its plan at the end."""

import time
from pathlib import Path
from typing import Any

import lightning

from llmtrain.plan import machine
from llmtrain.plan.actual import record
from llmtrain.plan.records import PlanVsActual, Prediction
from llmtrain.training.batches import StepBatch


class HeldAgainstPlan(lightning.Callback):
    """Writes `plan_vs_actual.json` when training ends or stops. First among the callbacks: what others do between two
    steps is not a step's time."""

    def __init__(self, directory: Path, prediction: Prediction, accelerator: str) -> None:
        self.directory, self.prediction, self.accelerator = directory, prediction, accelerator
        self.seconds: list[float] = []
        self.tokens: list[int] = []
        self.found: PlanVsActual | None = None

    def on_train_start(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
        machine.begin_peak(self.accelerator)

    def on_train_batch_start(
        self, trainer: lightning.Trainer, module: lightning.LightningModule, batch: StepBatch, batch_idx: int
    ) -> None:
        self.started = time.perf_counter()

    def on_train_batch_end(
        self,
        trainer: lightning.Trainer,
        module: lightning.LightningModule,
        outputs: Any,
        batch: StepBatch,
        batch_idx: int,
    ) -> None:
        self.seconds.append(time.perf_counter() - self.started)
        self.tokens.append(sum(micro_batch.packed.num_tokens for micro_batch in batch.micro_batches))

    def on_train_end(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
        peak = machine.peak_bytes(self.accelerator)
        self.found = record(self.directory, self.prediction, self.seconds, self.tokens, peak)
