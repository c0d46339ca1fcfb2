"""Speed, measured side by side: every contender in one process, or each in its own, in interleaved rounds.

`kernels` compares our own two routes, `models` training steps and forward passes with other libraries,
`start` the first prediction of a fresh process. Each gives a `Report`.
"""

import math
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from vitral.checkpoints import peers
from vitral.runtime.devices import Placement, cpu_count

ROUNDS = 7
# A reading of the clock spans at least this long, or as many calls as may be in one reading.
_SECONDS_A_READING, _MOST_CALLS = 0.2, 100


@dataclass(frozen=True)
class Row:
    """One contender at one task; without `seconds` there is a `reason`."""

    task: str
    contender: str
    configuration: str = ""
    detail: str = ""  # what the configuration is
    seconds: tuple[float, ...] = ()  # of one call, a number a round
    images: int | None = None  # in one call
    speed_ratio: float | None = None  # to the fastest of the other libraries' defaults
    peak_share: float | None = None  # of the GEMM's FLOP/s; counts the whole model for all contenders
    agreement: Mapping[str, float | bool] = field(default_factory=dict)  # with the reference; see `models`
    parts: Mapping[str, float] = field(default_factory=dict)  # median seconds of a call's parts
    peak_bytes: int | None = None  # resident memory at most
    reason: str | None = None  # why it could not be measured

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def spread(self) -> float:
        """(slowest - fastest) / median."""
        return (max(self.seconds) - min(self.seconds)) / self.median

    @property
    def images_per_second(self) -> float | None:
        return self.images / self.median if self.images else None

    def to_dict(self) -> dict[str, Any]:
        """The fields that are known, and what follows from them."""
        known = {name: value for name, value in vars(self).items() if value not in (None, "", (), {})}
        if self.seconds:
            known |= {"median_seconds": self.median, "spread": self.spread}
        if self.seconds and self.images:
            known["images_per_second"] = self.images_per_second
        return known


@dataclass(frozen=True)
class Report:
    """What a benchmark measured, on which machine."""

    benchmark: str
    subject: str  # the model, and what was done with it
    placement: str
    rows: tuple[Row, ...]
    machine: dict[str, Any]
    facts: dict[str, Any] = field(default_factory=dict)  # FLOPs, the GEMM's peak and the like

    def to_dict(self) -> dict[str, Any]:
        return {**vars(self), "rows": [row.to_dict() for row in self.rows]}


Call = Callable[[], object]


@dataclass(frozen=True)
class Settings:
    """How a benchmark is run."""

    placement: Placement
    rounds: int = ROUNDS
    compiled: bool = True  # False leaves out what needs torch.compile
    apart: bool = False  # each contender in a process of its own
    peers: tuple[str, ...] = ()  # the other libraries that compete; none named: all that are installed
    command: str = ""  # that began it, for the report
    say: Callable[[str], None] = lambda _: None  # told what is being done


class Elsewhere:
    """A contender in another process, which reads the clock there."""

    def read(self, calls: int) -> float:
        """Seconds of one of so many calls."""
        raise NotImplementedError


def read_clock(
    run: Call, calls: int, synchronize: Call, clock: Callable[[], float] = time.perf_counter
) -> float:
    """Seconds of one of so many calls; the device is waited for before and after all of them."""
    synchronize()
    began_at = clock()
    for _ in range(calls):
        run()
    synchronize()
    return (clock() - began_at) / calls


def interleaved(
    contenders: Mapping[str, Call | Elsewhere],
    rounds: int = ROUNDS,
    *,
    warm_up: bool = True,
    synchronize: Call = lambda: None,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, tuple[float, ...]]:
    """Seconds of one call of each contender, a number a round.

    After a round to warm up, every round reads each contender once, forwards and backwards in turn, so that
    a machine that grows slower does so for all alike. A contender that was quick in warming up is called
    several times a reading.

    Args:
        contenders: what to call.
        rounds: readings of each, at least 1.
        warm_up: False if all have been called before; a reading is then one call.
        synchronize: waits for the device; called before and after a reading only.
        clock: seconds.
    """

    def read(run: Call | Elsewhere, calls: int) -> float:
        if isinstance(run, Elsewhere):
            return run.read(calls)
        return read_clock(run, calls, synchronize, clock)

    names = list(contenders)
    calls = {name: _calls(read(run, 1)) if warm_up else 1 for name, run in contenders.items()}
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(rounds):
        for name in reversed(names) if number % 2 else names:
            seconds[name].append(read(contenders[name], calls[name]))
    return {name: tuple(readings) for name, readings in seconds.items()}


def _calls(seconds: float) -> int:
    if seconds <= 0:
        return _MOST_CALLS
    return min(max(math.ceil(_SECONDS_A_READING / seconds), 1), _MOST_CALLS)


def synchronizer(placement: Placement) -> Call:
    """Waits until the device has done what it was given."""
    match placement.device.type:
        case "cuda":
            return torch.cuda.synchronize
        case "mps":
            return torch.mps.synchronize
    return lambda: None


def matrix_product(placement: Placement) -> tuple[Call, int]:
    """A large square product in the placement's precision, and its FLOPs: what the device can do at best."""
    side = 2048 if placement.device.type == "cpu" else 8192
    a, b = (torch.randn(side, side, device=placement.device, dtype=placement.precision) for _ in range(2))
    out = torch.empty_like(a)
    return lambda: torch.mm(a, b, out=out), 2 * side**3


def describe_machine(placement: Placement, command: str) -> dict[str, Any]:
    """What a figure depends on."""
    gpu = torch.cuda.get_device_name(placement.device) if placement.device.type == "cuda" else None
    installed = [name for name in ("vitral", "torch", *peers.LIBRARIES) if peers.is_installed(name)]
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": command,
        "cpu": _cpu_name(),
        "cores": cpu_count(),
        "threads": torch.get_num_threads(),
        # Work of others; figures from a machine that is busy are worth little.
        "load_average": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "gpu": gpu,
        "system": platform.platform(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in installed},
    }


def _cpu_name() -> str:
    listing = Path("/proc/cpuinfo")
    if listing.exists():
        for line in listing.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
