"""How much memory this process may still take, a container's limit heeded."""

from pathlib import Path

import psutil


def available_bytes(cgroups: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> int:
    """Count what the machine has free, no more than is left of the limit of a control group.

    A container shows the whole machine's memory, and is killed at its own limit (Linux,
    Documentation/admin-guide/cgroup-v2.rst, "memory.max").

    Args:
        cgroups: where the system shows control groups, of version 2.
        own: where it says which groups this process is in.
    """
    free = psutil.virtual_memory().available
    try:
        lines = [line.split(":", 2) for line in own.read_text().splitlines()]
    except OSError:  # another system than Linux
        return free
    for group in (line[2] for line in lines if len(line) == 3 and not line[1]):
        place = cgroups / group.lstrip("/")
        for folder in (place, *place.parents):
            if folder.is_relative_to(cgroups):
                free = min(free, _left(folder, free))
    return max(free, 0)


def _left(group: Path, free: int) -> int:
    """What is left of a group's limit; what its files have in memory can be given up, and is left too."""
    try:
        limit = (group / "memory.max").read_text().strip()
        if limit == "max":
            return free
        used = int((group / "memory.current").read_text())
        statistics = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        return int(limit) - used + int(statistics.get("inactive_file", 0))
    except (OSError, ValueError):
        return free
