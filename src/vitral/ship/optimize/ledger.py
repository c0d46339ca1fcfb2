"""`Ledger`: what was measured of each form, and why it was taken or left out."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from vitral.ship.optimize.candidates import Candidate
from vitral.ship.optimize.judge import Judgement

Goal = Literal["latency", "throughput"]
# "left out": not tried here, with the reason; "slower": than the eager model; "not judged": a faster one was
# taken, or the time was over; "fits" only where all are judged.
Verdict = Literal["eager", "chosen", "fits", "too lossy", "slower", "not judged", "left out"]
LEDGER_FILE = "ledger.json"


@dataclass(frozen=True)
class Spread:
    """The median of some rounds, the least and the most."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        ordered = sorted(values)
        middle = len(ordered) // 2
        median = ordered[middle] if len(ordered) % 2 else (ordered[middle - 1] + ordered[middle]) / 2
        return cls(median, ordered[0], ordered[-1])


@dataclass(frozen=True)
class Speed:
    """How fast a form is, by interleaved rounds."""

    images_per_s: Spread  # with `batch` images at a time
    batch: int
    latency_ms: Spread  # of one image
    times_eager: Spread  # how many times as fast as the eager model, by the goal, round for round

    def images_a_second(self, goal: Goal) -> Spread:
        """By the goal: `batch` images at a time, or one."""
        if goal == "throughput":
            return self.images_per_s
        one = self.latency_ms
        return Spread(1000 / one.median, 1000 / one.high, 1000 / one.low)


@dataclass(frozen=True)
class Row:
    """What is known of one candidate."""

    candidate: Candidate
    verdict: Verdict
    reason: str = ""
    engine: str = ""  # name and version
    speed: Speed | None = None
    judgement: Judgement | None = None
    load_s: float | None = None  # in a new process, the first answer included
    memory_mb: float | None = None  # of that process, then
    disk_mb: float | None = None
    tried: dict[str, float] = field(default_factory=dict)  # strength -> how far logits were off, relative

    @property
    def name(self) -> str:
        return self.candidate.name

    def to_dict(self) -> dict[str, Any]:
        """Give all of it for JSON."""
        return {"name": self.name, **asdict(self)}


@dataclass(frozen=True)
class Ledger:
    """What was measured: on which machine, on which images, of which forms."""

    model: str
    data: str
    split: str
    goal: Goal
    max_drop: float  # points
    images: dict[str, int]  # "calibrating", "fitting", "judging"
    score_name: str
    machine: dict[str, Any]
    notes: tuple[str, ...]
    rows: tuple[Row, ...]  # the eager model first

    @property
    def chosen(self) -> Row | None:
        """The form that was taken; None: the eager model stays."""
        return next((row for row in self.rows if row.verdict == "chosen"), None)

    @property
    def eager(self) -> Row:
        return self.rows[0]

    def to_dict(self) -> dict[str, Any]:
        """Give all of it for JSON."""
        values = {name: value for name, value in vars(self).items() if name != "rows"}
        chosen = self.chosen
        return {
            **values,
            "chosen": None if chosen is None else chosen.name,
            "rows": [row.to_dict() for row in self.rows],
        }

    def conclusion(self) -> str:
        """Say in a line what came of it."""
        chosen = self.chosen
        if chosen is None:
            other = next((row.name for row in self.rows if row.verdict == "fits"), None)
            if other is not None:
                return (
                    f"{other} is the fastest within {self.max_drop:g} points, and no file: nothing is saved"
                )
            return f"no form is faster than the eager model within {self.max_drop:g} points: nothing is saved"
        assert chosen.speed is not None
        assert chosen.judgement is not None
        said = f"{chosen.name}: {chosen.speed.times_eager.median:.2f} times as fast as eager torch"
        if chosen.judgement.same_numbers:
            return f"{said}, with the same numbers"
        return f"{said}, and loses at most {100 * chosen.judgement.loss_high:.2f} points (95 %)"


def with_verdict(row: Row, verdict: Verdict, reason: str = "") -> Row:
    return replace(row, verdict=verdict, reason=reason)
