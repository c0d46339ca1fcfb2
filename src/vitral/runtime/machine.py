"""What a figure depends on beside the code: processor, threads, system."""

import platform
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vitral.runtime.threads import cpu_count, thread_count

if TYPE_CHECKING:
    from vitral.runtime.devices import Placement


def describe_machine(placement: "Placement") -> dict[str, Any]:
    """Give what `describe_host` gives, the GPU, and in how many threads this process computes."""
    import torch

    on_gpu = placement.device.type == "cuda"
    return {
        **describe_host(),
        "threads": thread_count(),
        "gpu": torch.cuda.get_device_name(placement.device) if on_gpu else None,
    }


def describe_host() -> dict[str, Any]:
    """Give processor, cores, system and Python of this process, and when it was asked (UTC)."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "cpu": _cpu_name(),
        "cores": cpu_count(),
        "system": platform.platform(),
        "python": platform.python_version(),
    }


def _cpu_name() -> str:
    listing = Path("/proc/cpuinfo")
    if listing.exists():
        for line in listing.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
