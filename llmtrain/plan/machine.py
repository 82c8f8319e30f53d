"""Facts about this machine and this process that plans need: who it is, how much memory there is and is in use."""

import ctypes
import gc
import os
import platform
import time
from importlib.metadata import version
from pathlib import Path

import torch

from llmtrain.config.infra import Infra

PROBE_SIZE, _PROBE_PRODUCTS = 384, 6


def identity(infra: Infra) -> dict[str, str]:
    """What must be equal for the times of one run to tell something about another's."""
    threads = infra.threads or len(os.sched_getaffinity(0)) // infra.ranks or 1
    device = torch.cuda.get_device_name() if infra.accelerator == "cuda" and torch.cuda.is_available() else _cpu_name()
    return {
        "device": device,
        "threads": str(threads),
        "precision": infra.precision,
        "compile": str(infra.compile),
        "ranks": f"{infra.ranks} {infra.strategy}" if infra.ranks > 1 else "1",
        "torch": version("torch"),
    }


def is_busy() -> bool:
    """Do others use this machine so much that what is timed now says little? More than two processes a core do."""
    return os.getloadavg()[0] > 2 * len(os.sched_getaffinity(0))


def resident_bytes() -> int:
    """Memory of this process now, after what it no longer uses was given back."""
    gc.collect()
    if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):  # glibc
        libc.malloc_trim(0)
    return _status("VmRSS")


def begin_peak(accelerator: str) -> None:
    """From now on `peak_bytes` counts anew."""
    if accelerator == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")


def peak_bytes(accelerator: str) -> int:
    """The most memory since `begin_peak`: of the process, or of what torch allocated on the device."""
    return torch.cuda.max_memory_allocated() if accelerator == "cuda" else _status("VmHWM")


def memory_bytes(accelerator: str) -> int:
    """What the device has; of the host what this process could have now, its own included."""
    if accelerator == "cuda":
        return int(torch.cuda.get_device_properties(0).total_memory)
    lines = Path("/proc/meminfo").read_text().splitlines()
    available = next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
    limit = Path("/sys/fs/cgroup/memory.max")
    most = int(text) if limit.exists() and (text := limit.read_text().strip()).isdigit() else 2**62
    return min(available * 1024 + _status("VmRSS"), most)


class Probe:
    """How fast this machine is at the moment. Others who use it make it slower, twice as slow at times."""

    def __init__(self) -> None:
        self._a, self._b = (torch.full((PROBE_SIZE, PROBE_SIZE), 0.01) for _ in range(2))

    def product_seconds(self) -> float:
        """Of a product of two small matrices, the mean of some milliseconds of them."""
        self._a @ self._b  # reads them from memory
        start = time.perf_counter()
        for _ in range(_PROBE_PRODUCTS):
            self._a @ self._b
        return (time.perf_counter() - start) / _PROBE_PRODUCTS


def matmul_flops_per_second(accelerator: str, dtype: torch.dtype) -> float:
    """The best that a square matrix product of moderate size reaches here: the peak that MFU refers to."""
    size = 4096 if accelerator == "cuda" else 1024
    a, b = (torch.full((size, size), 0.01, dtype=dtype, device=accelerator) for _ in range(2))
    times = []
    for _ in range(8):
        start = time.perf_counter()
        product = a @ b
        if accelerator == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    assert product.shape == (size, size)
    return 2.0 * size**3 / min(times)


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.machine()}, {len(os.sched_getaffinity(0))} cores"
