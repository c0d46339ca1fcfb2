"""The one thread that owns the model: it takes what waits, computes it together, and waits for more.

Nothing polls: a thread sleeps on a condition until a picture comes. While it is idle it never waits for
company: the first picture is computed at once, and those that come meanwhile are the next batch.
"""

import math
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from vitral.artifacts.engine import Answers
from vitral.ship.serve.refusal import too_late

# Of the moving mean of a batch's seconds, how much the newest counts.
_NEWEST = 0.15
# An explanation costs as much as many predictions: while pictures wait, at most this share of the time.
_SHARE_OF_EXPLANATIONS = 0.2


class Answer(NamedTuple):
    """What the model says of one picture."""

    logits_L: np.ndarray
    probabilities_L: np.ndarray


@dataclass(eq=False)
class Item:
    """A picture that waits; its `ticket` is whatever its request knows it by."""

    ticket: Any
    deadline: float  # of time.monotonic()
    pixels_HWC: np.ndarray | None = None
    since: float = field(default_factory=time.monotonic)
    dropped: bool = False  # nobody waits for it any more


@dataclass(eq=False)
class Look:
    """Other work for the thread that owns the model, such as an explanation."""

    ticket: Any
    deadline: float
    work: Callable[[], Any]
    dropped: bool = False


Outcome = tuple[Any, Any]  # the ticket; an answer, what a look gave, or the exception in its place


class Watch:
    """What the thread tells of its work; the default tells nobody."""

    def batch(self, count: int, seconds: float) -> None: ...
    def waited(self, seconds: float) -> None: ...


class Batcher:
    """Computes pictures in batches of what waits.

    Args:
        answers: the model; only this thread calls it.
        sizes: of batches that it computes, the smallest first; empty: any.
        most: pictures in a batch.
        deadline: seconds, for what a late picture is told.
        deliver: is given the outcomes of a batch, in this thread.
        watch: is told of batches and of waiting.
    """

    def __init__(
        self,
        answers: Callable[[np.ndarray], Answers],
        sizes: Sequence[int],
        most: int,
        deadline: float,
        deliver: Callable[[list[Outcome]], None],
        watch: Watch | None = None,
    ) -> None:
        self._answers, self._deliver = answers, deliver
        self._watch = watch or Watch()
        self._deadline = deadline
        self._sizes = tuple(size for size in sizes if size <= most) or _doubling(most)
        self._most = most if not sizes else self._sizes[-1]
        self._changed = threading.Condition()
        self._items: deque[Item] = deque()
        self._looks: deque[Look] = deque()
        self._looks_from = 0.0  # the time from which a look may go before pictures
        self._closed = False
        self._seconds: dict[int, float] = {}  # of a batch of each size
        self._thread = threading.Thread(target=self._run, name="inference", daemon=True)

    def start(self, first: Callable[[], None] = lambda: None) -> None:
        """Begins; what is to be done in the thread before all pictures, `first` does."""
        self._first = first
        self._thread.start()

    def put(self, item: Item) -> None:
        """Lets a picture wait for its turn. Any thread may."""
        with self._changed:
            self._items.append(item)
            self._changed.notify()

    def put_look(self, look: Look) -> None:
        with self._changed:
            self._looks.append(look)
            self._changed.notify()

    def close(self) -> None:
        """Ends the thread after what waits is done."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    def __len__(self) -> int:
        return len(self._items)

    @property
    def looks_waiting(self) -> int:
        return len(self._looks)

    def seconds_for(self, count: int) -> float:
        """How long so many pictures take, by the moving mean of the batches before; 0 before the first."""
        full, rest = divmod(count, self._most)
        of_full = self._of_size(self._most) * full
        return of_full + (self._of_size(rest) if rest else 0.0)

    def time_sizes(self, pixels_HWC: np.ndarray, rounds: int = 2) -> None:
        """Computes every size of a batch, which warms the model up, and keeps how long the last took.

        Raises:
            VitralError: as the engine does.
        """
        for size in self._sizes:
            for _ in range(rounds):
                began_at = time.monotonic()
                self._answers(np.broadcast_to(pixels_HWC, (size, *pixels_HWC.shape)).copy())
                self._seconds[size] = time.monotonic() - began_at

    # --- The thread -------------------------------------------------------------------------------

    def _run(self) -> None:
        self._first()
        while (taken := self._take()) is not None:
            if isinstance(taken, Look):
                self._look(taken)
            else:
                self._compute(taken)

    def _take(self) -> list[Item] | Look | None:
        """Waits for work: a look in its turn, else as many pictures as fit; None at the end."""
        with self._changed:
            self._changed.wait_for(lambda: self._items or self._looks or self._closed)
            if self._looks and (not self._items or time.monotonic() >= self._looks_from):
                return self._looks.popleft()
            if not self._items:
                return None
            return self._live()

    def _live(self) -> list[Item]:
        """The first pictures in line that can still be answered in time; the late ones are told so."""
        live: list[Item] = []
        late: list[Outcome] = []
        while self._items and len(live) < self._most:
            item = self._items.popleft()
            if item.dropped:
                continue
            # The first is tried while it has any time left: an old estimate is corrected by a new one alone.
            needed = self._of_size(len(live) + 1) if live else 0.0
            if time.monotonic() + needed > item.deadline:
                late.append((item.ticket, too_late(self._deadline)))
            else:
                live.append(item)
        if late:
            self._deliver(late)
        return live

    def _compute(self, items: list[Item]) -> None:
        if not items:
            return
        began_at = time.monotonic()
        for item in items:
            self._watch.waited(began_at - item.since)
        outcomes = self._outcomes(items)
        self._deliver(outcomes)
        seconds = time.monotonic() - began_at
        self._remember(len(items), seconds)
        self._watch.batch(len(items), seconds)

    def _outcomes(self, items: list[Item]) -> list[Outcome]:
        """The answer of each; if the batch fails, each alone, so that one failure is one picture's."""
        try:
            found = self._answers(np.stack([item.pixels_HWC for item in items]))  # pyrefly: ignore
        except Exception as error:
            if len(items) == 1:
                return [(items[0].ticket, error)]
            return [outcome for item in items for outcome in self._outcomes([item])]
        rows = zip(items, found.logits, found.probabilities, strict=True)
        return [(item.ticket, Answer(logits_L, row_L)) for item, logits_L, row_L in rows]

    def _look(self, look: Look) -> None:
        if look.dropped:
            return
        began_at = time.monotonic()
        if began_at > look.deadline:
            self._deliver([(look.ticket, too_late(self._deadline))])
            return
        try:
            outcome = look.work()
        except Exception as error:
            outcome = error
        ended_at = time.monotonic()
        self._looks_from = ended_at + (ended_at - began_at) * (1 / _SHARE_OF_EXPLANATIONS - 1)
        self._deliver([(look.ticket, outcome)])

    def _remember(self, count: int, seconds: float) -> None:
        size = self._padded(count)
        before = self._seconds.get(size, seconds)
        self._seconds[size] = before + _NEWEST * (seconds - before)

    def _of_size(self, count: int) -> float:
        """What a batch takes at most, by what is known of all sizes.

        Of one size alone what is known may be old, from a minute when the machine was busy, and never be
        known anew: by it, all are refused that would come into such a batch. A larger batch takes no less
        time, and as many small ones take no less either.
        """
        size = self._padded(count)
        known = list(self._seconds.items())  # the other thread adds to them
        bounds = [seconds if other >= size else math.ceil(size / other) * seconds for other, seconds in known]
        return min(bounds, default=0.0)

    def _padded(self, count: int) -> int:
        return next((size for size in self._sizes if size >= count), self._sizes[-1])


def _doubling(most: int) -> tuple[int, ...]:
    sizes = [1]
    while sizes[-1] < most:
        sizes.append(min(2 * sizes[-1], most))
    return tuple(sizes)
