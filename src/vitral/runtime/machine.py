"""What a figure depends on beside the code: processor, threads, system."""

import platform
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from vitral.runtime.devices import Placement
from vitral.runtime.threads import cpu_count, thread_count


def describe_machine(placement: Placement) -> dict[str, Any]:
    """Give processor, cores, threads, GPU, system and Python of this process, and when it was asked (UTC)."""
    on_gpu = placement.device.type == "cuda"
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "cpu": _cpu_name(),
        "cores": cpu_count(),
        "threads": thread_count(),
        "gpu": torch.cuda.get_device_name(placement.device) if on_gpu else None,
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
