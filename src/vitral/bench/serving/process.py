"""What a server's process takes: memory and time, with the processes that it started."""

import asyncio
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import psutil

from vitral.runtime.errors import VitralError

_SECONDS_A_LOOK = 0.25


@dataclass(frozen=True)
class Family:
    """A process and those that it started."""

    pid: int

    @classmethod
    def of(cls, pid: int) -> "Family":
        """Raises VitralError if there is no such process, or it may not be looked at."""
        try:
            psutil.Process(pid).cpu_times()
        except psutil.Error as error:
            raise VitralError(f"--pid {pid}: there is no such process that one may look at") from error
        return cls(pid)

    def _members(self) -> Iterator[psutil.Process]:
        with suppress(psutil.Error):
            process = psutil.Process(self.pid)
            yield from (process, *process.children(recursive=True))

    def resident_bytes(self) -> int:
        """Resident memory of all; what they share counts for each."""
        total = 0
        for process in self._members():
            with suppress(psutil.Error):
                total += process.memory_info().rss
        return total

    def cpu_seconds(self) -> float:
        """Processor time of all since they began."""
        total = 0.0
        for process in self._members():
            with suppress(psutil.Error):
                times = process.cpu_times()
                total += times.user + times.system
        return total


class Watch:
    """Looks at the machine while a load runs."""

    def __init__(self, server: Family | None) -> None:
        self._server = server
        self._began_at, self._ours, self._all = time.perf_counter(), time.process_time(), _busy_seconds()
        self._servers = server.cpu_seconds() if server else 0.0
        self._before = self._peak = server.resident_bytes() if server else 0

    async def look(self) -> None:
        """Note the server's memory until it is cancelled."""
        while self._server:
            self._peak = max(self._peak, self._server.resident_bytes())
            await asyncio.sleep(_SECONDS_A_LOOK)

    def to_dict(self) -> dict[str, Any]:
        """Processor time in cores, memory in bytes."""
        seconds = time.perf_counter() - self._began_at
        ours = (time.process_time() - self._ours) / seconds
        busy = (_busy_seconds() - self._all) / seconds
        found: dict[str, Any] = {"generator_cores": ours, "machine_cores": busy}
        if self._server:
            after = self._server.resident_bytes()
            found |= {
                "server_cores": (self._server.cpu_seconds() - self._servers) / seconds,
                "server_bytes_before": self._before,
                "server_bytes_peak": max(self._peak, after),
                "server_bytes_after": after,
            }
        return found


@contextmanager
def watched(server: Family | None) -> Iterator[Watch]:
    """Look at the server from here on."""
    watch = Watch(server)
    task = asyncio.ensure_future(watch.look())
    try:
        yield watch
    finally:
        task.cancel()


def _busy_seconds() -> float:
    """Time that all cores of the machine worked, for whomever."""
    times = psutil.cpu_times()
    return sum(times) - times.idle - getattr(times, "iowait", 0.0) - getattr(times, "guest", 0.0)


def machine_load() -> float | None:
    """Work of others; figures from a machine that is busy are worth little."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None
