"""What training takes, step by step, held against its plan at the end."""

import math
import time
from pathlib import Path
from typing import Any

import lightning

from llmtrain.plan import machine
from llmtrain.plan.actual import record
from llmtrain.plan.records import PlanVsActual, Prediction
from llmtrain.training.batches import StepBatch

_BETWEEN_PROBES_S = 0.4
"""A probe takes some 6 ms."""


class HeldAgainstPlan(lightning.Callback):
    """Writes `plan_vs_actual.json` when training ends or stops. First among the callbacks: what others do between two
    steps is not a step's time."""

    def __init__(self, directory: Path, prediction: Prediction, accelerator: str) -> None:
        self.directory, self.prediction, self.accelerator = directory, prediction, accelerator
        self.probe = machine.Probe() if prediction.features.product_seconds else None
        self.probed_at = -math.inf
        self.products: list[float] = []
        self.seconds: list[float] = []
        self.tokens: list[int] = []
        self.found: PlanVsActual | None = None

    def on_train_start(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
        machine.begin_peak(self.accelerator)

    def on_train_batch_start(
        self, trainer: lightning.Trainer, module: lightning.LightningModule, batch: StepBatch, batch_idx: int
    ) -> None:
        if self.probe and time.perf_counter() - self.probed_at > _BETWEEN_PROBES_S:
            self.products.append(self.probe.product_seconds())
            self.probed_at = time.perf_counter()
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
        self.found = record(self.directory, self.prediction, self.seconds, self.tokens, peak, self.products)
