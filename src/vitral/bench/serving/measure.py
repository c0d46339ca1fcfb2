"""`measure`: a server under load, from its address and pictures to a report."""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from vitral.bench.serving import process
from vitral.bench.serving.connection import Connections
from vitral.bench.serving.load import Phase, Rate, Sender, closed, each, opened
from vitral.bench.serving.target import Encode, Request, Target, raw, requests_of
from vitral.runtime import limits
from vitral.runtime.errors import VitralError
from vitral.runtime.machine import describe_host
from vitral.runtime.ranges import refuse_beyond
from vitral.runtime.stopping import StopSignal, stop_signal

# So many requests at a time ask what the right answers are.
_ASKING = 4
_FILES_FOR_OTHERS = 64  # of those that a process may have open
_MOST_CONNECTIONS = 4_096


@dataclass(frozen=True)
class Load:
    """What a server is loaded with."""

    clients: int = 16  # of the closed loop
    seconds: float = 20.0  # of each load
    rates: tuple[Rate, ...] = ()  # an open loop each; none: a closed loop alone
    timeout: float = 30.0  # seconds after which a request without an answer is lost
    pid: int | None = None  # of a server on this machine, whose memory is looked at
    idle: float = 5.0  # seconds that such a server is looked at before the load
    token: str | None = None
    elsewhere: bool = False  # the server may be on another machine
    encode: Encode = raw
    seed: int = 0  # of when requests come, and about which pictures
    command: str = ""  # that began it, for the report
    say: Callable[[str], None] = field(default=lambda _: None)

    def check(self) -> None:
        """Raises VitralError if a number is none that can be meant."""
        refuse_beyond("clients", self.clients, limits.CLIENTS)
        for name, value in (("seconds", self.seconds), ("timeout", self.timeout)):
            low, high = limits.LOAD_SECONDS
            if not low <= value <= high:
                raise VitralError(f"{name}={value:g}: it must be from {low} to {high:,} seconds")
        for rate in self.rates:
            if not rate.of_capacity and rate.value * self.seconds > limits.REQUESTS:
                raise VitralError(
                    f"{rate} for {self.seconds:g} s is more than {limits.REQUESTS:,} requests; "
                    "take fewer seconds"
                )


@dataclass(frozen=True)
class ServingReport:
    """What a server did under load."""

    url: str
    pictures: int
    bytes_a_picture: float
    phases: tuple[Phase, ...]
    machine: dict[str, Any]
    idle: dict[str, Any] = field(default_factory=dict)  # the server before any load, if its process is known
    stopped_by: int | None = None  # a signal's number

    def to_dict(self) -> dict[str, Any]:
        return {
            "benchmark": "serve",
            **vars(self),
            "phases": [phase.to_dict() for phase in self.phases],
        }


def measure(url: str, pictures: Sequence[Path], load: Load | None = None) -> ServingReport:
    """Load a running server and say what became of every request.

    Before the clock runs, each picture is sent once, so that later answers can be compared with the first.

    Args:
        url: of the server, such as ``http://127.0.0.1:8000``; without a path, predictions are asked for.
        pictures: files that are sent.
        load: by default 16 clients for 20 seconds.

    A stop (Ctrl-C) ends the load, and the report is of what was measured until then.

    Raises:
        VitralError: if a number or the address cannot be used, the server refuses a picture or does not
            answer, or a stop comes before anything was measured.
    """
    load = load or Load()
    load.check()
    target = Target.of(url, elsewhere=load.elsewhere)
    requests = requests_of(target, pictures, encode=load.encode, token=load.token)
    with stop_signal() as stop:
        phases, idle = asyncio.run(_measured(target, requests, load, stop))
    if not phases:
        raise VitralError("interrupted before anything was measured")
    installed = {name: version(name) for name in ("vitral", "httptools")}
    machine = {"command": load.command, **describe_host(), "load_average": process.machine_load()}
    size = sum(len(request.content) for request in requests) / len(requests)
    return ServingReport(
        url, len(requests), size, phases, {**machine, "versions": installed}, idle, stop.number
    )


async def _measured(
    target: Target, requests: Sequence[Request], load: Load, stop: StopSignal
) -> tuple[tuple[Phase, ...], dict[str, Any]]:
    server = None if load.pid is None else process.Family.of(load.pid)
    connections = Connections(target, load.timeout, _most_connections())
    sender = Sender(connections, requests, load.seed)
    try:
        await _known(sender, len(requests), stop)
        idle = await _idle(server, load.idle, stop)
        phases = await _loaded(sender, load, server, stop)
    finally:
        await connections.close()
    return phases, idle


async def _known(sender: Sender, count: int, stop: StopSignal) -> None:
    async def know(number: int) -> None:
        if not stop.requested:
            await sender.know(number)

    await each(count, know, _ASKING)


async def _idle(server: process.Family | None, seconds: float, stop: StopSignal) -> dict[str, Any]:
    """What a server takes that nobody asks anything."""
    if server is None or not seconds or stop.requested:
        return {}
    with process.watched(server) as watch:
        await asyncio.sleep(seconds)
        return {"seconds": seconds, **watch.to_dict()}


async def _loaded(
    sender: Sender, load: Load, server: process.Family | None, stop: StopSignal
) -> tuple[Phase, ...]:
    phases: list[Phase] = []

    async def add(run: Callable[[], Any], title: str) -> None:
        if stop.requested:
            return
        load.say(f"{title} for {load.seconds:g} s")
        with process.watched(server) as watch:
            phase = await run()
            phase.machine = watch.to_dict()
        phases.append(phase)

    if not load.rates or any(rate.of_capacity for rate in load.rates):
        await add(lambda: closed(sender, load.clients, load.seconds, stop), f"{load.clients} clients")
    capacity = phases[0].throughput if phases else None
    for rate in load.rates:
        wanted = rate.per_second(capacity)
        if rate.of_capacity and not wanted:
            break  # stopped, or a server that accepts nothing
        title = f"{rate} = {wanted:.0f}/s" if rate.of_capacity else str(rate)
        await add(lambda wanted=wanted, title=title: opened(sender, wanted, title, load.seconds, stop), title)
    return tuple(phases)


def _most_connections() -> int:
    """As many as the process may have files open."""
    try:
        import resource
    except ImportError:  # Windows
        return 256
    allowed = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if allowed == resource.RLIM_INFINITY:
        return _MOST_CONNECTIONS
    return max(min(allowed - _FILES_FOR_OTHERS, _MOST_CONNECTIONS), 1)
