"""What is set of a whole process's memory; imports nothing that is slow to load."""

import ctypes
from contextlib import suppress

# M_MMAP_MAX: no blocks of their own. M_TRIM_THRESHOLD: nothing is given back (glibc's malloc.h).
_GLIBC_KEEPS = ((-4, 0), (-1, -1))


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
