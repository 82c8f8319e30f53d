"""`infra.hardware`: what a device can do, what it draws and what it costs. For plans; no run computes with it."""

from typing import Annotated, Literal

from annotated_types import Gt, Le
from pydantic import Discriminator

from llmtrain.config.base import Added, Changes, Settings


class MeasuredHardware(Settings):
    """The machine that plans: its speed is measured on the first plan and kept in `outputs/plan`."""

    kind: Annotated[Literal["measured"], Changes.SURFACE, Added(3, "measured")]
    watts: Annotated[float | None, Gt(0), Changes.SURFACE, Added(3, None)]
    """Power of the whole machine under load, in watts; null where it is not known: energy is not planned then."""
    price_per_hour: Annotated[float | None, Gt(0), Changes.SURFACE, Added(3, None)]
    """US dollars for an hour of the machine; null where nobody pays for it: cost is not planned then."""
    assumed_mfu: Annotated[float | None, Gt(0), Le(1), Changes.SURFACE, Added(3, None)]
    """Share of the measured peak that training is taken to reach, causal attention counted half, until runs here have
    been measured; null where every kernel is timed on its own, which is done on a CPU."""


class PublishedHardware(Settings):
    """A device that need not be here, by its maker's figures."""

    kind: Annotated[Literal["published"], Changes.SURFACE]
    device: Annotated[str, Changes.SURFACE]
    """What the device is called, and where its figures are from."""
    memory_gib: Annotated[float, Gt(0), Changes.SURFACE]
    """Memory of one device that a process can have, in GiB."""
    peak_bf16_tflops: Annotated[float, Gt(0), Changes.SURFACE]
    """Dense bf16 matrix products of one device, in TFLOP/s, without sparsity."""
    peak_fp32_tflops: Annotated[float, Gt(0), Changes.SURFACE]
    """Dense fp32 matrix products of one device, in TFLOP/s."""
    memory_gb_per_s: Annotated[float, Gt(0), Changes.SURFACE]
    """Bandwidth of one device's memory, in GB/s."""
    link_gb_per_s: Annotated[float, Gt(0), Changes.SURFACE]
    """Bandwidth between two devices of a machine, one way, in GB/s."""
    watts: Annotated[float, Gt(0), Changes.SURFACE]
    """Power of one device under load, in watts, without the machine around it."""
    price_per_hour: Annotated[float | None, Gt(0), Changes.SURFACE]
    """US dollars for an hour of one device; null where nobody pays for it: cost is not planned then."""
    assumed_mfu: Annotated[float, Gt(0), Le(1), Changes.SURFACE]
    """Share of the peak that training is taken to reach, causal attention counted half, until runs on this device have
    been measured."""
    assumed_because: Annotated[str, Changes.SURFACE]
    """Why that share: what was measured, by whom, under which conditions."""


Hardware = Annotated[MeasuredHardware | PublishedHardware, Discriminator("kind")]
