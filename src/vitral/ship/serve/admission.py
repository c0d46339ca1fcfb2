"""Who may wait: by how long it would take, and by how much of the line one client has."""

import time
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from vitral.ship.serve.refusal import Refusal

# Of the deadline, what the estimated wait may take; the rest is for what no estimate knows.
_PART = 0.6
# A client's part of the line while others are about, and for how long those are who asked before.
_CLIENTS_PART = 0.5
_ABOUT_SECONDS = 10.0
_MOST_CLIENTS = 10_000  # that are remembered


class Admission:
    """Counts the pictures that wait, all and each client's. Used by the event loop alone.

    Args:
        seconds_for: how long so many pictures take.
        deadline: seconds from a request to its answer.
    """

    def __init__(self, seconds_for: Callable[[int], float], deadline: float) -> None:
        self._seconds_for, self._deadline = seconds_for, deadline
        self.waiting = 0
        self._of_client: defaultdict[str, int] = defaultdict(int)
        self._seen: OrderedDict[str, float] = OrderedDict()

    def check(self, client: str, count: int = 1) -> None:
        """Raises Refusal if so many pictures more would be late, or are more than their client's share."""
        others = self._others_about(client)
        if not self.waiting:
            return  # what takes longer alone would never be answered
        room = _PART * self._deadline
        wait = self._seconds_for(self.waiting + count)
        if wait > room:
            raise Refusal(
                503,
                f"too many wait: the answer would take some {wait:.1f} s; come again later",
                "overloaded",
                retry_after=wait - room,
            )
        own = self._of_client.get(client, 0)
        if others and own and (taken := self._seconds_for(own + count)) > _CLIENTS_PART * room:
            raise Refusal(
                429,
                "too many of your requests wait, and others ask too; come again later",
                "client_share",
                retry_after=taken - _CLIENTS_PART * room,
            )

    @contextmanager
    def place(self, client: str, count: int = 1) -> Iterator[None]:
        """A place in line for so many pictures, for as long as they wait. Raises Refusal as `check`."""
        self.check(client, count)
        self.waiting += count
        self._of_client[client] += count
        try:
            yield
        finally:
            self.waiting -= count
            self._of_client[client] -= count
            if not self._of_client[client]:
                del self._of_client[client]

    def _others_about(self, client: str) -> bool:
        """Whether another client has asked lately; and remembers this one."""
        now = time.monotonic()
        self._seen[client] = now
        self._seen.move_to_end(client)
        while len(self._seen) > _MOST_CLIENTS or next(iter(self._seen.values())) < now - _ABOUT_SECONDS:
            self._seen.popitem(last=False)
        return len(self._seen) > 1
