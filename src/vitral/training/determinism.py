"""The same seed gives the same bits; what that changes in the process is given back."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

_WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"


@contextmanager
def deterministic() -> Iterator[None]:
    """Inside, the same seed gives the same bits on a GPU too, where some kernels otherwise add in any order.

    All of it, and a GPU's random numbers, are the caller's again afterwards.
    """
    memory: Any = torch.utils.deterministic  # an attribute that type checkers do not see
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    filled, workspace = memory.fill_uninitialized_memory, os.environ.get(_WORKSPACE)
    os.environ.setdefault(_WORKSPACE, ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    # Every tensor would be filled before it is written, against bugs that the tests of resuming would show.
    memory.fill_uninitialized_memory = False
    try:
        with torch.random.fork_rng([torch.cuda.current_device()] if torch.cuda.is_initialized() else []):
            yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        memory.fill_uninitialized_memory = filled
        if workspace is None:
            os.environ.pop(_WORKSPACE, None)
