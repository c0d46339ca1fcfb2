"""What became of every request: answered, refused or lost, and when."""

import json
from array import array
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from vitral.bench.serving.connection import Reply

OK, REFUSALS = 200, (429, 503)
# By which answers are compared: they are close to each other, never the same digits for every batch size.
_SAME_PROBABILITY = 1e-3


@dataclass
class _Times:
    """Of the answers with one status, in seconds."""

    from_due: array = field(default_factory=lambda: array("d"))
    from_sent: array = field(default_factory=lambda: array("d"))


@dataclass
class Tally:
    """Counts requests; each is added once, whatever became of it."""

    begun: int = 0
    times: dict[int, _Times] = field(default_factory=lambda: defaultdict(_Times))  # by status
    lost: Counter[str] = field(default_factory=Counter)  # by reason
    in_time: int = 0  # accepted and answered before the load ended
    without_retry_after: int = 0  # refused, and not told when to come again
    otherwise: int = 0  # accepted, and answered otherwise than the first time
    lags: array = field(
        default_factory=lambda: array("d")
    )  # s from when a request was due to when it was sent

    def answered(self, reply: Reply, due: float, sent: float, ended: float) -> None:
        times = self.times[reply.status]
        times.from_due.append(ended - due)
        times.from_sent.append(ended - sent)
        if reply.status in REFUSALS and not reply.retry_after:
            self.without_retry_after += 1

    def count(self, *statuses: int) -> int:
        return sum(len(self.times[status].from_due) for status in statuses if status in self.times)

    @property
    def unfinished(self) -> int:
        """Requests of which nothing is known, as they were waited for no longer."""
        return self.begun - sum(self.lost.values()) - self.count(*self.times)

    def to_dict(self) -> dict[str, Any]:
        """Counts, and times in milliseconds."""
        answers = {
            str(status): {
                "requests": len(times.from_due),
                "share": len(times.from_due) / self.begun,
                "ms": percentiles(times.from_due),
                "ms_from_sending": percentiles(times.from_sent),
            }
            for status, times in sorted(self.times.items())
        }
        return {
            "requests": self.begun,
            "answers": answers,
            "lost": dict(self.lost),
            "unfinished": self.unfinished,
            "refused_without_retry_after": self.without_retry_after,
            "answered_otherwise": self.otherwise,
            "generator_late_ms": percentiles(self.lags),
        }


def percentiles(seconds: Sequence[float] | array) -> dict[str, float] | None:
    """Milliseconds that half, 95 and 99 of a hundred took at most, and the longest."""
    if not len(seconds):
        return None
    p50, p95, p99, longest = 1e3 * np.percentile(np.asarray(seconds), [50, 95, 99, 100])
    return {"p50": float(p50), "p95": float(p95), "p99": float(p99), "max": float(longest)}


@dataclass(frozen=True)
class Answer:
    """The likeliest label of a picture with its probability, as a server said."""

    label: str
    probability: float

    @classmethod
    def of(cls, body: bytes) -> "Answer | None":
        """Read ``{"predictions": [{"top": [{"label", "probability"}]}]}``; None if it says something else."""
        try:
            first = json.loads(body)["predictions"][0]["top"][0]
            return cls(str(first["label"]), float(first["probability"]))
        except (ValueError, LookupError, TypeError):
            return None

    def agrees(self, other: "Answer | None") -> bool:
        """Whether it is the same answer: another batch's rounding may swap labels that are as likely."""
        if other is None:
            return False
        return abs(self.probability - other.probability) <= _SAME_PROBABILITY
