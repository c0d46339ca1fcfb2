"""What is set for a whole process, its threads and its memory; imports nothing that is slow to load."""

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress

# A thread that waits for work by spinning takes its neighbours' time, and one that sleeps is slow to wake;
# 5,000 turns lose little of either (docs/log.md, 2026-11-22 and 25).
_THREADS = {"GOMP_SPINCOUNT": "5000"}
# M_MMAP_MAX: no blocks of their own. M_TRIM_THRESHOLD: nothing is given back (glibc's malloc.h).
_GLIBC_KEEPS = ((-4, 0), (-1, -1))


def set_threads() -> None:
    """Set how threads wait, unless the user has said; to be called before torch is loaded."""
    if "OMP_WAIT_POLICY" not in os.environ:
        for name, value in _THREADS.items():
            os.environ.setdefault(name, value)


@contextmanager
def threads_as_they_come() -> Iterator[None]:
    """Start processes inside with none of what `set_threads` set."""
    ours = {name: value for name, value in _THREADS.items() if os.environ.get(name) == value}
    for name in ours:
        del os.environ[name]
    try:
        yield
    finally:
        os.environ.update(ours)


def return_freed_memory() -> None:
    """Let glibc give the system what is free in each thread's part of the heap; elsewhere nothing happens."""
    with suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


def keep_freed_memory() -> None:
    """Let glibc keep what is freed for the next step, rather than fetch it from the system, page by page.

    A step frees and takes the same large blocks each time, and their pages cost 7 % of it (docs/log.md,
    2026-11-25). The process's memory then stays at its peak. Elsewhere than on glibc nothing happens.
    """
    try:
        tune = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return
    for parameter, value in _GLIBC_KEEPS:
        tune(parameter, value)
