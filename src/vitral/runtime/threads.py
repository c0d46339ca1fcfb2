"""How many cores and threads there are, and how threads wait; torch is loaded by those who have loaded it.

How many *processes* load images is the decision of `data/workers.py: worker_count`.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# That read images for `Classifier`, beside the one that computes.
DECODING_THREADS = 4
# A thread that waits for work by spinning takes its neighbours' time, and one that sleeps is slow to wake;
# 5,000 turns lose little of either (docs/log.md, 2026-11-22 and 25).
_WAITING = {"GOMP_SPINCOUNT": "5000"}


# --- How many --------------------------------------------------------------------------------------


def cpu_count() -> int:
    """Count the cores that this process may use: those that it may run on, no more than its quota."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = cpu_quota()
    return cores if quota is None else max(min(cores, int(quota)), 1)


def local_size() -> int:
    """Count the processes of one run that share this machine, and its cores and memory, as torchrun says."""
    return max(int(os.environ.get("LOCAL_WORLD_SIZE", "1")), 1)


def cpu_quota(cgroups: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> float | None:
    """How many cores' time a container's quota gives; None: there is none.

    A process that computes with more threads than that is stopped for a part of each tenth of a second.
    The quota is the least of its group and the groups above it, as version 2 or 1 of cgroups states it
    (Linux, Documentation/admin-guide/cgroup-v2.rst, "cpu.max").

    Args:
        cgroups: where the system shows control groups.
        own: where it says which groups this process is in.
    """
    try:
        lines = [line.split(":", 2) for line in own.read_text().splitlines()]
    except OSError:  # another system than Linux
        return None
    found = []
    for _, controllers, group in (line for line in lines if len(line) == 3):
        if not controllers or "cpu" in controllers.split(","):
            root = cgroups if not controllers else cgroups / "cpu"
            place = root / group.lstrip("/")
            found += [_quota(folder) for folder in (place, *place.parents) if folder.is_relative_to(root)]
    return min((quota for quota in found if quota is not None), default=None)


def _quota(group: Path) -> float | None:
    try:
        if (limit := group / "cpu.max").exists():
            quota, period = limit.read_text().split()
        else:
            quota, period = (
                (group / f"cpu.cfs_{name}_us").read_text().strip() for name in ("quota", "period")
            )
        return None if quota == "max" or int(quota) <= 0 else int(quota) / int(period)
    except (OSError, ValueError):
        return None


def engine_threads() -> int:
    """Choose how many threads an engine computes with: one a core, or what OMP_NUM_THREADS says.

    Torch heeds that variable by itself; other engines count the cores of the whole machine, even within a
    quota (openvino#37838, onnxruntime#29510).
    """
    wanted = os.environ.get("OMP_NUM_THREADS", "")
    return min(int(wanted), cpu_count()) if wanted.isdecimal() and int(wanted) else cpu_count()


def thread_count(wanted: int | None = None, began_with: int | None = None) -> int:
    """Choose how many threads compute: as many as the user wants, else as a run began with, else torch's own.

    Args:
        wanted: 0 or None if the user says nothing.
        began_with: those of a run that is resumed on the CPU, where another number changes the bits.
    """
    import torch

    return wanted or began_with or torch.get_num_threads()


@contextmanager
def computing_threads(count: int) -> Iterator[None]:
    """Share a computation inside among so many threads of the CPU."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def compute_in_one_thread() -> None:
    """Leave the cores to others, in a worker process that loads images."""
    import torch

    torch.set_num_threads(1)


# --- How they wait ---------------------------------------------------------------------------------


def set_how_threads_wait() -> None:
    """Set how threads wait, unless the user has said; to be called before torch is loaded."""
    if "OMP_WAIT_POLICY" not in os.environ:
        for name, value in _WAITING.items():
            os.environ.setdefault(name, value)


@contextmanager
def threads_wait_as_they_come() -> Iterator[None]:
    """Start processes inside with none of what `set_how_threads_wait` set."""
    ours = {name: value for name, value in _WAITING.items() if os.environ.get(name) == value}
    for name in ours:
        del os.environ[name]
    try:
        yield
    finally:
        os.environ.update(ours)
