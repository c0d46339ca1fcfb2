"""What several methods' numbers on the same images prove: intervals, tests of all pairs, groups of equals.

M counts methods, N images.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from string import ascii_lowercase

import numpy as np

from vitral.evaluation.diagnosis.paired_tests import paired

DRAWS = 2_000
SIGNIFICANCE = 0.05
_SEED = 0


@dataclass(frozen=True)
class Estimate:
    """A mean over images, with its 95 % interval."""

    mean: float
    low: float
    high: float

    def __contains__(self, value: float) -> bool:
        return self.low <= value <= self.high


@dataclass(frozen=True)
class Pair:
    """How one method's mean differs from another's, on the same images."""

    first: str
    second: str
    difference: Estimate
    p: float  # of Student's paired test, by Holm's correction for all pairs

    @property
    def differ(self) -> bool:
        """Whether they differ beyond chance."""
        return self.p < SIGNIFICANCE


def estimates(values_MN: np.ndarray) -> list[Estimate]:
    """Gives each method's mean with its percentile interval, by 2,000 draws of the images.

    All methods see the same draws. The draws of N images are counts, and the means of all draws are one
    product: scipy.stats.bootstrap would copy the values for each draw.
    """
    count = values_MN.shape[1]
    counts_DN = np.random.default_rng(_SEED).multinomial(count, np.full(count, 1 / count), size=DRAWS)
    means_DM = counts_DN @ values_MN.T / count
    low_M, high_M = np.quantile(means_DM, [0.025, 0.975], axis=0)
    columns = values_MN.mean(axis=1), low_M, high_M
    return [Estimate(*map(float, row)) for row in zip(*columns, strict=True)]


def compare(names: Sequence[str], values_MN: np.ndarray) -> list[Pair]:
    """Compares every two methods: paired bootstrap intervals, and tests that hold for all pairs together.

    The tests are Student's for pairs with Holm's correction (1979). The draws could not serve: 2,000 show no
    chance below 1 in 1,000, and among 100 pairs Holm asks for 1 in 2,000. Intervals are of each pair alone.
    """
    places = list(combinations(range(len(names)), 2))
    if not places:
        return []
    differences_PN = np.stack([values_MN[first] - values_MN[second] for first, second in places])
    chances = holm([paired(difference_N)[2] for difference_N in differences_PN])
    return [
        Pair(names[first], names[second], estimate, chance)
        for (first, second), estimate, chance in zip(places, estimates(differences_PN), chances, strict=True)
    ]


def holm(chances: Sequence[float]) -> list[float]:
    """Adjusts the p-values of several tests so that the chance of any false alarm stays what it says."""
    order = np.argsort(chances, kind="stable")
    scaled = np.asarray(chances, dtype=float)[order] * np.arange(len(chances), 0, -1)
    adjusted = np.empty(len(chances))
    adjusted[order] = np.minimum(np.maximum.accumulate(scaled), 1)
    return adjusted.tolist()


def letters(names: Sequence[str], pairs: Sequence[Pair]) -> dict[str, str]:
    """Gives each method letters, so that two share one exactly if they do not differ.

    The compact letter display of Piepho (2004), by insertion and absorption. Names come best first, so that
    the best has an "a".
    """
    columns = [frozenset(names)]
    for pair in pairs:
        if pair.differ:
            parts = [part for column in columns for part in _apart(column, pair.first, pair.second)]
            columns = [part for part in dict.fromkeys(parts) if not any(part < other for other in parts)]
    columns.sort(key=lambda column: sorted(map(names.index, column)))
    return {
        name: "".join(_letter(place) for place, column in enumerate(columns) if name in column)
        for name in names
    }


def _apart(column: frozenset[str], first: str, second: str) -> list[frozenset[str]]:
    return [column - {first}, column - {second}] if {first, second} <= column else [column]


def _letter(place: int) -> str:
    return ascii_lowercase[place] if place < len(ascii_lowercase) else f"({place + 1})"
