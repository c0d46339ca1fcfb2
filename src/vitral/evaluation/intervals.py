"""`Share`: a share of counted things with its interval; the one interval of shares that Vitral gives."""

from dataclasses import dataclass


def wilson(count: int, total: int) -> tuple[float, float]:
    """Compute Wilson's 95 % score interval of a share (Wilson, 1927); all of 0..1 if nothing was counted."""
    from scipy.stats import binomtest

    if not total:
        return 0.0, 1.0
    interval = binomtest(count, total).proportion_ci(method="wilson")
    return float(interval.low), float(interval.high)


@dataclass(frozen=True)
class Share:
    """So many of so many, with Wilson's 95 % interval."""

    count: int
    total: int
    value: float | None  # 0..1; None: of nothing
    low: float
    high: float

    @classmethod
    def of(cls, count: int, total: int) -> "Share":
        """Make the share `count` / `total`."""
        count, total = int(count), int(total)
        return cls(count, total, count / total if total else None, *wilson(count, total))
