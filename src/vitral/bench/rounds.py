"""Interleaved rounds: every contender is read once a round, so that a machine that slows does so for all."""

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from vitral.runtime.devices import Placement

ROUNDS = 7
# A reading of the clock spans at least this long, or as many calls as may be in one reading.
_SECONDS_A_READING, _MOST_CALLS = 0.2, 100

Call = Callable[[], object]


@dataclass(frozen=True)
class Settings:
    """How a benchmark is run."""

    placement: Placement
    rounds: int = ROUNDS
    compiled: bool = True  # False leaves out what needs torch.compile
    isolated: bool = False  # each contender in a process of its own
    peers: tuple[str, ...] = ()  # the other libraries that compete; none named: all that are installed
    command: str = ""  # that began it, for the report
    say: Callable[[str], None] = lambda _: None  # told what is being done


class Elsewhere:
    """A contender in another process, which reads the clock there."""

    def read(self, calls: int) -> float:
        """Give the seconds of one of so many calls."""
        raise NotImplementedError


def read_clock(
    run: Call, calls: int, synchronize: Call, clock: Callable[[], float] = time.perf_counter
) -> float:
    """Measure the seconds of one of so many calls; the device is waited for before and after all of them."""
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
    """Measure the seconds of one call of each contender, a number a round.

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
    """Give what waits until the device has done what it was given."""
    match placement.device.type:
        case "cuda":
            return torch.cuda.synchronize
        case "mps":
            return torch.mps.synchronize
    return lambda: None


def matrix_product(placement: Placement) -> tuple[Call, int]:
    """Give a large square product in the placement's precision, the device's best, and its FLOPs."""
    side = 2048 if placement.device.type == "cpu" else 8192
    a, b = (torch.randn(side, side, device=placement.device, dtype=placement.precision) for _ in range(2))
    out = torch.empty_like(a)
    return lambda: torch.mm(a, b, out=out), 2 * side**3
