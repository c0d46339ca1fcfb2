"""`Clock`: where the time of a run goes, by the clock of the process; `TimeSpent`: the same as a record.

Nothing waits for a GPU here. What a step hands to it is waited for where the loss is next read, and counts as
the step's.
"""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

# What the process does, one part at a time, in words for people.
PARTS = {
    "choosing": "trying ways of training",
    "starting": "fitting the first head",
    "opening": "reading small images into memory",
    "waiting": "waiting for training images",
    "stepping": "forward, backward and update",
    "evaluating": "evaluating",
    "saving": "saving",
}
# What loading the training images takes, in the order of `Batch.seconds`. Decoding and augmentation, in all
# processes together: part of "waiting" where images are loaded in this one, and beside everything else where
# workers do it. The way to the device is part of "waiting" always.
LOADING = {"decoding": "decoding", "altering": "augmentation", "moving": "moving to the device"}


class Clock:
    """Counts seconds by part; what is timed within another part counts for itself alone."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._part: str | None = None
        self._since = 0.0

    def add(self, part: str, seconds: float) -> None:
        """Count time that was taken otherwise."""
        if seconds:
            self.seconds[part] = self.seconds.get(part, 0.0) + seconds

    @contextmanager
    def of(self, part: str) -> Iterator[None]:
        """Count the time inside for a part."""
        outer = self._part
        self._turn_to(part)
        try:
            yield
        finally:
            self._turn_to(outer)

    def _turn_to(self, part: str | None) -> None:
        now = time.perf_counter()
        if self._part is not None:
            self.add(self._part, now - self._since)
        self._part, self._since = part, now

    def record(self) -> dict[str, float]:
        """Give the seconds so far for JSON."""
        return {part: round(seconds, 3) for part, seconds in sorted(self.seconds.items())}


@dataclass(frozen=True)
class TimeSpent:
    """Where a run's time went."""

    total: float  # seconds, those of every session and of the last evaluations
    parts: dict[
        str, float
    ]  # seconds by the names of `PARTS`, in their order; they and `other` make up `total`
    other: float
    decoding: float  # processor seconds of all processes, as of `LOADING`
    altering: float
    moving: float = 0.0  # seconds, within those of "waiting"

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> "TimeSpent | None":
        """Read a line of ``metrics.jsonl`` or a ``summary.json``; None of a run that wrote no times down."""
        found = record.get("time")
        if not found:
            return None
        parts = {name: float(found[name]) for name in PARTS if name in found}
        known = sum(parts.values())
        total = max(float(record["seconds"]), known)
        loading = (float(found.get(name, 0.0)) for name in LOADING)
        return cls(total, parts, total - known, *loading)
