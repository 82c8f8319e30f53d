"""What a plan says and what came of it, as records: `llmtrain plan --json` and `plan_vs_actual.json` of a run."""

from pydantic import BaseModel, ConfigDict

CLASSES = ("gemm", "attention", "elementwise", "head", "optimizer")
"""Classes of kernels, each with a rate of its own: `head` is all that happens between hidden states and the loss."""


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class Convention(_Record):
    """FLOPs under one convention; see `llmtrain.plan.flops`."""

    forward_per_token: float
    backward_per_token: float
    recomputed_per_token: float
    """By activation checkpointing; no part of the model's FLOPs"""
    total: float | None
    """Of the whole run, reference and recomputation left out; null where the number of steps is not known"""
    mfu: float
    """Model FLOPs a second over the peak of the hardware"""


class MemoryParts(_Record):
    """Bytes on one rank at the fullest moment of a step."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    workspace: int


class Plan(_Record):
    """What a run will need, before it is launched."""

    name: str
    hardware: str
    """The device, and where its figures are from"""
    ranks: int
    strategy: str
    parameters: int
    trained_parameters: int
    parameters_without_embeddings: int
    tokens: int | None
    """Through the model in the whole run; null where that depends on data that are not prepared"""
    steps: int | None
    tokens_per_step: float
    """Over all ranks"""
    workload_from: str
    causal_half: Convention
    causal_full: Convention
    memory: MemoryParts
    """Live bytes by part"""
    process_bytes: int
    """What the interpreter and its libraries take besides; on CUDA the context"""
    fragmentation_bytes: int
    """What the allocator takes besides"""
    peak_bytes: int
    """All of it: resident memory of the process, or memory of the device"""
    host_bytes: int
    """What offloading puts into the host's memory"""
    capacity_bytes: int
    fits: bool
    largest_micro_batch_tokens: int
    """Largest `infra.micro_batch_tokens` with which the run fits, by powers of two, at most a whole step; 0 for none"""
    remedies: tuple[str, ...]
    """Overrides that make it fit, where it does not"""
    seconds_by_class: dict[str, float]
    """Of a mean step, by class of kernel; `calls` is the time between kernels, `link` what ranks wait for each other"""
    seconds_per_step: float
    tokens_per_second: float
    """Over all ranks"""
    peak_flops_per_second: float
    """Of all ranks, dense, at the run's precision"""
    mfu_because: str
    """Whether the speed was measured here, calibrated from runs, or assumed, and from what"""
    bound_by: str
    eta_seconds: float | None
    """Of the optimizer steps: evaluations, checkpoints and preparation come on top"""
    watt_hours: float | None
    cost_usd: float | None


class Features(_Record):
    """What a prediction was made of, so that later plans can learn from it."""

    seconds: dict[str, float]
    """By class, as measured kernel by kernel and before calibration, on a machine undisturbed by others"""
    product_seconds: float | None
    """Of the product of `llmtrain.plan.machine.Probe` then; null where kernels are not timed"""
    calls: float
    """Operators called in a mean step"""
    heap_bytes: int
    """Simulated heap on a CPU; live bytes on CUDA"""
    baseline_bytes: int
    """Resident memory of the process before the network was made"""


class Figures(_Record):
    """What is predicted and then measured."""

    peak_bytes: int
    seconds_per_step: float
    tokens_per_second: float
    mfu_half: float
    mfu_full: float


class Prediction(_Record):
    """Made before training; `record` holds it against what came."""

    machine: dict[str, str]
    """What must be equal for a run to calibrate another's plan"""
    features: Features
    predicted: Figures
    tokens_per_step: float
    flops_per_token_half: float
    flops_per_token_full: float
    peak_flops_per_second: float
    calibrated_from: int
    """Runs that the prediction learnt from"""


class PlanVsActual(_Record):
    """`plan_vs_actual.json`."""

    prediction: Prediction
    measured: Figures
    num_steps: int
    """Steps that the times are the median of"""
    peak_error: float
    """Predicted over measured, less one"""
    seconds_error: float
    """The same of the step's time"""
    product_seconds: float | None
    """Of the same product between the steps, the mean: how disturbed the machine was; null where the prediction has
    none"""
