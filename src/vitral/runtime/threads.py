"""How many cores and threads there are, and how threads wait; torch is loaded by those who have loaded it.

How many *processes* load images is the decision of `data/workers.py: worker_count`.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager

# That read images for `Classifier`, beside the one that computes.
DECODING_THREADS = 4
# A thread that waits for work by spinning takes its neighbours' time, and one that sleeps is slow to wake;
# 5,000 turns lose little of either (docs/log.md, 2026-11-22 and 25).
_WAITING = {"GOMP_SPINCOUNT": "5000"}


# --- How many --------------------------------------------------------------------------------------


def cpu_count() -> int:
    """Count the cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


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
