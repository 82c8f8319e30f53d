"""From a config to a plan: memory, time, energy and cost, before anything is launched."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

import torch

from llmtrain.config.compose import load_config
from llmtrain.config.hardware import MeasuredHardware, PublishedHardware
from llmtrain.config.root import TrainConfig
from llmtrain.config.trainer import DPOTrainer
from llmtrain.errors import UserError
from llmtrain.plan import machine
from llmtrain.plan.calibration import Calibration, calibrated, runs_on
from llmtrain.plan.flops import Flops, flops
from llmtrain.plan.kernels import Kernels
from llmtrain.plan.memory import per_rank
from llmtrain.plan.records import Convention, Features, Figures, MemoryParts, Plan, Prediction
from llmtrain.plan.speed import assumed_mfu, assumed_seconds, kernel_seconds
from llmtrain.plan.step import Recipe, StepTrace, trace_step
from llmtrain.plan.trace import shapes_of_products
from llmtrain.plan.workload import Workload

CUDA_CONTEXT_BYTES = 600 * 2**20
"""What CUDA and its libraries keep on a device for a process (an H100 with CUDA 12 shows about that)."""
CUDA_FRAGMENTATION = 0.05
"""Of the live bytes, what torch's caching allocator holds besides; 2 to 10 % is usual without expandable segments."""
CODE_BYTES = 1_000_000
"""Of oneDNN's code for one shape of a product in bf16: 0.9 to 1.3 MB with AMX, seen over 102 and 39 shapes."""
HEADROOM = 0.97
"""Share of the memory that a plan may fill."""

RecipeOf = Callable[[TrainConfig], Recipe]
BOUNDS = {
    "gemm": "matrix products in the blocks",
    "attention": "attention: shorter sequences or documents would help",
    "elementwise": "memory traffic between the matrix products: infra.compile fuses it",
    "head": "the output layer: a smaller vocabulary would help",
    "optimizer": "the optimizer: more tokens a step would help",
    "calls": "Python between kernels: a larger infra.micro_batch_tokens would help",
    "link": "traffic between ranks: a larger micro-batch would help",
}


@dataclass
class Planner:
    """Plans of one config; each part is computed when it is first asked for."""

    config: TrainConfig
    recipe_of: RecipeOf
    workload: Workload
    outputs: Path
    baseline_bytes: int
    """Resident memory of a process that is about to make its network"""

    @property
    def is_timed(self) -> bool:
        """Is each kernel timed here?"""
        infra = self.config.infra
        return isinstance(infra.hardware, MeasuredHardware) and infra.accelerator == "cpu"

    @cached_property
    def step(self) -> StepTrace:
        return trace_step(self.config, self.recipe_of(self.config), self.workload.largest)

    @cached_property
    def identity(self) -> dict[str, str]:
        found = machine.identity(self.config.infra)
        hardware = self.config.infra.hardware
        return found | {"device": hardware.device} if isinstance(hardware, PublishedHardware) else found

    @cached_property
    def calibration(self) -> Calibration:
        return calibrated(runs_on(self.outputs, self.identity))

    @property
    def num_micro_batches(self) -> int:
        return max(len(rows) for rows in self.workload.steps)

    @cached_property
    def heap_bytes(self) -> int:
        """Of a rank's step at its fullest moment: live on a device, as glibc lays it out on a CPU."""
        parts = per_rank(self.step, self.config.infra, self.num_micro_batches)
        if self.config.infra.accelerator == "cuda":
            return parts.total
        alone = sum(self.step.peak(self.num_micro_batches).values())
        return self.step.heap_peak(self.num_micro_batches) * parts.total // alone

    @cached_property
    def features(self) -> Features:
        if self.config.infra.accelerator == "cuda":
            return Features(seconds={}, product_seconds=None, calls=0, heap_bytes=self.heap_bytes, baseline_bytes=0)
        seconds: dict[str, float] = {}
        calls, product_seconds = 0.0, None
        if self.is_timed:
            kernels = Kernels(self.outputs, self.identity)
            kernels.know(op for trace in (self.step.first, self.step.more, self.step.update) for op in trace.ops)
            kernels.keep()
            seconds, calls = kernel_seconds(self.step, self.workload, kernels.seconds)
            product_seconds = kernels.product_seconds
        return Features(
            seconds=seconds,
            product_seconds=product_seconds,
            calls=calls,
            heap_bytes=self.heap_bytes,
            baseline_bytes=self.baseline_bytes + self.code_bytes,
        )

    @cached_property
    def code_bytes(self) -> int:
        """What oneDNN makes and keeps for the products in bf16 on a CPU: code for each shape, of each length of row."""
        infra = self.config.infra
        if infra.accelerator == "cuda" or infra.precision != "bf16":
            return 0
        lengths = {row.num_tokens for step in self.workload.steps for row in step}
        return len(shapes_of_products(self.step.first, torch.bfloat16)) * len(lengths) * CODE_BYTES

    @cached_property
    def peak_flops(self) -> float:
        """FLOP/s of one device, at the precision of the products."""
        infra = self.config.infra
        bf16 = infra.precision == "bf16"
        match infra.hardware:
            case PublishedHardware() as published:
                return (published.peak_bf16_tflops if bf16 else published.peak_fp32_tflops) * 1e12
            case MeasuredHardware():
                if infra.accelerator == "cuda" and not torch.cuda.is_available():
                    raise UserError(
                        "infra.hardware.kind=measured, but PyTorch sees no CUDA device to measure: plan for one by its "
                        "maker's figures (infra=h100), or where the device is"
                    )
                dtype = torch.bfloat16 if bf16 else torch.float32
                kernels = Kernels(self.outputs, self.identity)
                return kernels.once("peak", lambda: machine.matmul_flops_per_second(infra.accelerator, dtype))

    @cached_property
    def seconds(self) -> tuple[dict[str, float], str]:
        """(seconds by class of a mean step, why)."""
        if self.is_timed:
            runs = self.calibration.num_runs
            learnt = f"calibrated from {runs} run{'s' if runs > 1 else ''} here" if runs else "no run to learn from yet"
            busy = "; it is busy now, so times are too long" if machine.is_busy() else ""
            return self.calibration.seconds(self.features), f"each kernel timed on this machine{busy}; {learnt}"
        infra = self.config.infra
        mfu, why = assumed_mfu(infra.hardware, runs_on(self.outputs, self.identity))
        link: float | None = None
        match infra.hardware:
            case PublishedHardware() as published:
                bandwidth, link = published.memory_gb_per_s * 1e9, published.link_gb_per_s * 1e9
            case MeasuredHardware():
                bandwidth = self.peak_flops / 300  # an H100 computes 300 FLOP while it reads a byte
        found = assumed_seconds(self.step, self.workload, infra, self.peak_flops, bandwidth, link, mfu)
        return found, f"MFU {mfu:.0%} (causal attention halved), {why}"

    def flops(self, convention: Literal["half", "full"]) -> Flops:
        """Of a mean step on one rank."""
        rows = [row for rows in self.workload.steps for row in rows]
        found = flops(rows, self.step, convention, self.config.infra.activation_checkpointing)
        count = len(self.workload.steps)
        return Flops(found.forward / count, found.backward / count, found.recomputed / count)

    def total_flops(self, convention: Literal["half", "full"]) -> float | None:
        """Of the whole run, over all ranks, the reference's forward passes included; None where its length is open."""
        if not self.workload.num_tokens:
            return None
        counted, tokens = self.flops(convention), self.workload.tokens_per_step
        total = counted.of_model / tokens * self.workload.num_tokens
        if isinstance(self.config.trainer, DPOTrainer):
            total += counted.forward / tokens * self.workload.num_tokens / self.config.trainer.epochs
        return total

    @property
    def process_bytes(self) -> int:
        if self.config.infra.accelerator == "cuda":
            return CUDA_CONTEXT_BYTES
        return round(self.baseline_bytes + self.code_bytes + self.calibration.loaded_bytes)

    @property
    def allocated_bytes(self) -> int:
        """What the allocator holds at the fullest moment."""
        on_cuda = self.config.infra.accelerator == "cuda"
        factor = 1 + CUDA_FRAGMENTATION if on_cuda else self.calibration.heap_factor
        return round(self.heap_bytes * factor)

    @property
    def capacity_bytes(self) -> int:
        infra = self.config.infra
        if isinstance(infra.hardware, PublishedHardware):
            return round(infra.hardware.memory_gib * 2**30)
        whole = machine.memory_bytes(infra.accelerator)
        return whole if infra.accelerator == "cuda" else whole // infra.ranks

    @property
    def fits(self) -> bool:
        return self.process_bytes + self.allocated_bytes <= HEADROOM * self.capacity_bytes

    @cached_property
    def largest_micro_batch_tokens(self) -> int:
        """By powers of two: what grows with tokens is scaled from the traced step."""
        row, infra = self.step.row, self.config.infra
        parts = per_rank(self.step, infra, 2)
        growing = parts.parts["activations"] + parts.parts["workspace"]
        ratio = self.allocated_bytes / parts.total
        room = HEADROOM * self.capacity_bytes - self.process_bytes - self.allocated_bytes
        whole_step = sum(row.num_tokens for row in self.workload.steps[0])
        smallest = max(length + context for length, context in row.segments)
        tokens, found = 1, 0
        while tokens < 2 * whole_step:
            more = (min(tokens, whole_step) / row.num_tokens - 1) * growing * ratio
            if tokens >= smallest and more <= room:
                found = tokens
            tokens *= 2
        return found

    def with_overrides(self, *overrides: str) -> "Planner":
        """The planner of the same config with other `infra` or `adapter` settings."""
        infra, adapter = self.config.infra, self.config.adapter
        for override in overrides:
            key, _, value = override.partition("=")
            if key == "adapter":
                adapter = load_config([override]).adapter
            else:
                name = key.removeprefix("infra.")
                infra = infra.model_copy(update={name: int(value) if value.isdigit() else value})
        config = self.config.model_copy(update={"infra": infra, "adapter": adapter})
        workload = self.workload.cut(infra.micro_batch_tokens)
        found = Planner(config, self.recipe_of, workload, self.outputs, self.baseline_bytes)
        same_step = infra.model_copy(update={"ranks": self.config.infra.ranks, "strategy": self.config.infra.strategy})
        if same_step == self.config.infra and adapter == self.config.adapter:
            found.step = self.step
        return found

    def remedies(self) -> Iterator[tuple[str, ...]]:
        """Overrides that make it fit, the mildest first, each set on its own; none where it fits."""
        if self.fits:
            return
        infra = self.config.infra
        smallest = 2 ** math.ceil(math.log2(max(length + context for length, context in self.step.row.segments)))
        one_row = f"infra.micro_batch_tokens={smallest}"
        recomputing = "infra.activation_checkpointing=full"
        kinds: list[list[tuple[str, ...]]] = [  # of each kind, from the mildest to the strongest
            [(f"infra.loss_chunk_tokens={max(1, infra.loss_chunk_tokens // 8)}",)],
            [("infra.activation_checkpointing=selective",), (recomputing,), (one_row, recomputing)],
            [("adapter=lora",), ("adapter=lora", one_row), ("adapter=lora", one_row, recomputing)],
        ]
        if infra.accelerator == "cuda":
            ranks = [2**n for n in range(1, 7) if 2**n > infra.ranks]
            kinds.append([("infra.strategy=fsdp2", f"infra.ranks={number}") for number in ranks])
        if self.largest_micro_batch_tokens:
            yield (f"infra.micro_batch_tokens={self.largest_micro_batch_tokens}",)
        for kind in kinds:
            if found := next((overrides for overrides in kind if self.with_overrides(*overrides).fits), None):
                yield found

    def plan(self) -> Plan:
        """The whole plan. Raises UserError where the hardware to be measured is not here."""
        config, infra, workload, step = self.config, self.config.infra, self.workload, self.step
        by_class, why = self.seconds
        seconds = sum(by_class.values())
        ranks = 1 if infra.strategy == "tensor_parallel" else infra.ranks
        live = per_rank(step, infra, self.num_micro_batches)
        hours = seconds * workload.num_steps / 3600 if workload.num_steps else None
        watts, price = infra.hardware.watts, infra.hardware.price_per_hour
        devices = infra.ranks if isinstance(infra.hardware, PublishedHardware) else 1
        by_half, by_full = self._convention("half", seconds), self._convention("full", seconds)
        bound = max(by_class, key=lambda name: by_class[name])
        peak_bytes = self.process_bytes + self.allocated_bytes
        return Plan(
            name=config.name,
            hardware=self.identity["device"],
            ranks=infra.ranks,
            strategy=infra.strategy,
            parameters=step.num_parameters,
            trained_parameters=step.num_trained,
            parameters_without_embeddings=step.num_parameters - step.num_embedding,
            tokens=workload.num_tokens,
            steps=workload.num_steps,
            tokens_per_step=workload.tokens_per_step * ranks,
            workload_from=workload.known_from,
            causal_half=by_half,
            causal_full=by_full,
            memory=MemoryParts(**live.parts),
            process_bytes=self.process_bytes,
            fragmentation_bytes=self.allocated_bytes - live.total,
            peak_bytes=peak_bytes,
            host_bytes=live.on_host,
            capacity_bytes=self.capacity_bytes,
            fits=self.fits,
            largest_micro_batch_tokens=self.largest_micro_batch_tokens,
            remedies=tuple(" ".join(overrides) for overrides in self.remedies()),
            seconds_by_class=by_class,
            seconds_per_step=seconds,
            tokens_per_second=workload.tokens_per_step * ranks / seconds,
            peak_flops_per_second=self.peak_flops * infra.ranks,
            mfu_because=why,
            bound_by=f"{by_class[bound] / seconds:.0%} of a step: {BOUNDS[bound]}",
            eta_seconds=hours * 3600 if hours else None,
            watt_hours=hours * watts * devices if hours and watts else None,
            cost_usd=hours * price * devices if hours and price else None,
        )

    def prediction(self) -> Prediction:
        """What is to come true: held against the run by `llmtrain.plan.actual`."""
        seconds = sum(self.seconds[0].values())
        ranks = 1 if self.config.infra.strategy == "tensor_parallel" else self.config.infra.ranks
        tokens = self.workload.tokens_per_step * ranks
        half, full = (one.of_model * ranks / tokens for one in (self.flops("half"), self.flops("full")))
        peak = self.peak_flops * self.config.infra.ranks
        on_device = self.config.infra.accelerator == "cuda"  # torch counts what it allocates, not the context
        return Prediction(
            machine=self.identity,
            features=self.features,
            predicted=Figures(
                peak_bytes=self.features.heap_bytes if on_device else self.process_bytes + self.allocated_bytes,
                seconds_per_step=seconds,
                tokens_per_second=tokens / seconds,
                mfu_half=half * tokens / seconds / peak,
                mfu_full=full * tokens / seconds / peak,
            ),
            tokens_per_step=tokens,
            flops_per_token_half=half,
            flops_per_token_full=full,
            peak_flops_per_second=peak,
            calibrated_from=self.calibration.num_runs,
        )

    def _convention(self, name: Literal["half", "full"], seconds: float) -> Convention:
        counted, tokens = self.flops(name), self.workload.tokens_per_step
        return Convention(
            forward_per_token=counted.forward / tokens,
            backward_per_token=counted.backward / tokens,
            recomputed_per_token=counted.recomputed / tokens,
            total=self.total_flops(name),
            mfu=counted.of_model / seconds / self.peak_flops,
        )


def refuse(planner: Planner) -> None:
    """Raises UserError where the plan does not fit, with the overrides that would make it fit.

    Blocks that torch.compile fuses are planned as if they were not, which is too much: they are not refused.
    """
    if planner.fits or planner.config.infra.compile:
        return
    plan = planner.plan()
    needed, there = plan.peak_bytes / 2**30, plan.capacity_bytes / 2**30
    ways = "\n".join(f"  {overrides}" for overrides in plan.remedies) or "  a smaller model, or a larger device"
    raise UserError(
        f"the plan needs {needed:.1f} GiB on each rank, and there are {there:.1f}: it would run out of memory. "
        f"What would make it fit, each line on its own:\n{ways}\n--force goes on as it is"
    )
