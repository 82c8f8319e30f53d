"""What a run was computed on: hardware and versions, without the names of hosts, people or directories."""

import os
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path

import torch

from llmtrain import __version__

CHANGES = " + changes"
"""Behind the commit of a checkout whose files differ from it."""
PACKAGES = ("torch", "transformers", "lightning", "tokenizers")


def machine() -> dict[str, str]:
    """What stands in the report, by name; what cannot be found out is left out."""
    found = {
        "CPU": _cpu_name(),
        "cores": str(len(os.sched_getaffinity(0))),
        "threads": str(torch.get_num_threads()),
        "memory": f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.0f} GiB",
        "GPU": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "system": f"{platform.system()} {platform.machine()}",
        "Python": platform.python_version(),
        "llmtrain": __version__,
        **{package: version(package) for package in PACKAGES},
    }
    if found_commit := commit():
        found["commit"] = found_commit
    return found


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def commit() -> str | None:
    """The commit of the checkout that llmtrain is imported from, with `CHANGES` where files differ; None elsewhere."""
    checkout = Path(__file__).parents[2]
    if not (checkout / ".git").exists():
        return None
    try:
        head, changes = (
            subprocess.run(
                ["git", "-C", str(checkout), *command], capture_output=True, text=True, timeout=5, check=True
            )
            for command in (["rev-parse", "--short=12", "HEAD"], ["status", "--porcelain", "--untracked-files=no"])
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return head.stdout.strip() + (CHANGES if changes.stdout else "")
