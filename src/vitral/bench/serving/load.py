"""Two kinds of load, closed and open.

In a closed loop each client waits for its answer before it asks again: it finds what a server can do, and
hides how late it is, for a slow server is asked less often. In an open loop requests come when they come, by
a Poisson process, and each is timed from when it was *due*, not from when it could be sent; else the requests
that a stall held back count as quick ones ("coordinated omission").
"""

import asyncio
import random
import re
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from vitral.bench.serving.connection import REFUSED, Connections, Lost
from vitral.bench.serving.tally import OK, REFUSALS, Answer, Tally
from vitral.bench.serving.target import Request
from vitral.runtime.errors import VitralError
from vitral.runtime.limits import RATE
from vitral.runtime.stopping import StopSignal

# What a client that was refused waits before it asks again; else sixteen of them ask for nothing else.
_SECONDS_TO_COME_AGAIN = 0.05
# How often a picture is sent before the clock runs, to a server that is busy.
_TRIES, _SECONDS_BETWEEN_TRIES = 40, 0.25
_SECONDS_BETWEEN_LOOKS_AT_STOP = 0.1
_SECONDS_AFTER_STOP = 1.0


@dataclass(frozen=True)
class Rate:
    """Requests a second, or as a multiple of what the server was found to be able to do."""

    value: float
    of_capacity: bool

    def per_second(self, capacity: float | None) -> float:
        return self.value * (capacity or 0) if self.of_capacity else self.value

    def __str__(self) -> str:
        return f"{self.value:g}x" if self.of_capacity else f"{self.value:g}/s"


def rates_of(text: str) -> tuple[Rate, ...]:
    """Read "100" or "0.5x,1x,3x". Raises VitralError if it says something else."""
    rates = []
    for word in text.split(","):
        found = re.fullmatch(r"\s*(\d+(?:\.\d*)?|\.\d+)(x?)\s*", word)
        if not found or not 0 < float(found[1]) <= (1_000 if found[2] else RATE[1]):
            raise VitralError(
                f"rate {text!r}: give requests a second up to {RATE[1]:,}, such as 100, or multiples of what "
                "the server can do, such as 0.5x,1x,3x"
            )
        rates.append(Rate(float(found[1]), bool(found[2])))
    return tuple(rates)


@dataclass
class Phase:
    """One load and what came of it."""

    title: str
    rate: float | None = None  # requests a second that were due; None: a closed loop
    seconds: float = 0.0
    tally: Tally = field(default_factory=Tally)
    machine: dict[str, Any] = field(default_factory=dict)  # see `process.Watch`

    @property
    def throughput(self) -> float:
        """Accepted requests a second that were answered before the load ended."""
        return self.tally.in_time / self.seconds if self.seconds else 0.0

    def to_dict(self) -> dict[str, Any]:
        return {
            "load": self.title,
            "rate": self.rate,
            "seconds": self.seconds,
            "accepted_per_second": self.throughput,
            **self.tally.to_dict(),
            **self.machine,
        }


class Sender:
    """Sends requests and counts what becomes of them."""

    def __init__(self, connections: Connections, requests: Sequence[Request], seed: int) -> None:
        self._connections, self._requests, self._url = connections, requests, connections.target.url
        self.random = random.Random(seed)  # which pictures, and when
        self.answers: dict[int, Answer | None] = {}  # the first of each picture

    async def know(self, number: int) -> None:
        """Ask about a picture until it is answered. Raises VitralError if there is no answer."""
        request, reply = self._requests[number], None
        for _ in range(_TRIES):
            try:
                reply = await self._connections.ask(request.content)
            except Lost as lost:
                if str(lost) == REFUSED:
                    raise VitralError(f"nothing answers at {self._url}; is the server running?") from None
                raise VitralError(f"{request.name}: the server gave no answer: {lost}") from None
            if reply.status not in REFUSALS:
                break
            await asyncio.sleep(_SECONDS_BETWEEN_TRIES)
        assert reply is not None
        if reply.status != OK:
            said = " ".join(reply.body[:300].decode(errors="replace").split())
            raise VitralError(f"{request.name}: the server answered {reply.status}: {said}")
        self.answers[number] = Answer.of(reply.body)

    async def send(self, phase: Phase, due: float, until: float) -> int | None:
        """Send one request about any picture; gives the status of its answer."""
        tally = phase.tally
        number = self.random.randrange(len(self._requests))
        tally.begun += 1
        sent = time.perf_counter()
        tally.lags.append(sent - due)
        try:
            reply = await self._connections.ask(self._requests[number].content)
        except Lost as lost:
            tally.lost[str(lost)] += 1
            return None
        ended = time.perf_counter()
        tally.answered(reply, due, sent, ended)
        if reply.status == OK:
            tally.in_time += ended <= until
            known = self.answers.get(number)
            if known is not None and not known.agrees(Answer.of(reply.body)):
                tally.otherwise += 1
        return reply.status


async def closed(sender: Sender, clients: int, seconds: float, stop: StopSignal) -> Phase:
    """Load a server with clients that each wait for an answer before they ask again."""
    phase = Phase(f"closed loop, {clients} clients")
    began_at = time.perf_counter()
    until = began_at + seconds

    async def client() -> None:
        while time.perf_counter() < until and not stop.requested:
            status = await sender.send(phase, time.perf_counter(), until)
            if status is None or status in REFUSALS:
                await asyncio.sleep(_SECONDS_TO_COME_AGAIN)

    await _finished([asyncio.ensure_future(client()) for _ in range(clients)], stop)
    phase.seconds = min(time.perf_counter(), until) - began_at
    return phase


async def opened(sender: Sender, rate: float, title: str, seconds: float, stop: StopSignal) -> Phase:
    """Load a server with requests that come by a Poisson process, whether it keeps up or not."""
    phase = Phase(f"open loop, {title}", rate)
    began_at = due = time.perf_counter()
    until = began_at + seconds
    under_way: set[asyncio.Future] = set()
    while (due := due + sender.random.expovariate(rate)) < until and not stop.requested:
        while (wait := due - time.perf_counter()) > 0 and not stop.requested:
            await asyncio.sleep(min(wait, _SECONDS_BETWEEN_LOOKS_AT_STOP))
        task = asyncio.ensure_future(sender.send(phase, due, until))
        under_way.add(task)
        task.add_done_callback(under_way.discard)
        await asyncio.sleep(0)  # what comes in is read, however late this is
    while time.perf_counter() < until and not stop.requested:
        await asyncio.sleep(min(until - time.perf_counter(), _SECONDS_BETWEEN_LOOKS_AT_STOP))
    phase.seconds = min(time.perf_counter(), until) - began_at
    await _finished(list(under_way), stop)
    return phase


async def _finished(tasks: Sequence[asyncio.Future], stop: StopSignal) -> None:
    """Wait for all; after a stop for a second, for what is under way then is not known to be lost."""
    left: set[asyncio.Future] = set(tasks)
    while left and not stop.requested:
        _, left = await asyncio.wait(left, timeout=_SECONDS_BETWEEN_LOOKS_AT_STOP)
    if left:
        _, left = await asyncio.wait(left, timeout=_SECONDS_AFTER_STOP)
    for task in left:
        task.cancel()
    await _raised(tasks)


async def _raised(tasks: Sequence[asyncio.Future]) -> None:
    """Wait for all, and raise the failure of the first that has one; those of the others count as seen."""
    for result in await asyncio.gather(*tasks, return_exceptions=True):
        if isinstance(result, Exception):
            raise result


async def each(count: int, call: Callable[[int], Awaitable[None]], at_a_time: int) -> None:
    """Call with every number below `count`, some at a time; the first failure ends it."""
    numbers = iter(range(count))

    async def worker() -> None:
        for number in numbers:
            await call(number)

    tasks = [asyncio.ensure_future(worker()) for _ in range(min(at_a_time, count))]
    _, left = await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
    for task in left:
        task.cancel()
    await _raised(tasks)
