"""`Drawing`: what every figure is, one model's numbers with their words, table and picture."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from vitral.explain.figures.house import Look

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Row = dict[str, Any]  # one line of a table: column -> value
Reach = dict[str, tuple[float, float]]  # axis -> lowest and highest value


@dataclass(frozen=True)
class Drawing(ABC):
    """One figure of one model.

    The words are the kind's, the same for every model; `finding` is this model's own, in numbers.
    """

    name: ClassVar[str]  # of its files
    title: ClassVar[str]
    see: ClassVar[str]  # what to see in it, in two sentences
    recipe: ClassVar[str]  # whose recipe it is, and what was chosen where authors disagree
    photographs: ClassVar[bool] = False  # and no words: one picture serves light and dark pages

    @property
    def height(self) -> float:
        """Inches; the width is the house's."""
        return 3.2

    @abstractmethod
    def finding(self) -> str:
        """Says in one sentence what this model's numbers are."""

    @abstractmethod
    def rows(self) -> Iterator[Row]:
        """Gives the lines of its table; all have the same columns."""

    def reach(self) -> Reach:
        """Gives the ranges of the axes that models side by side share."""
        return {}

    @abstractmethod
    def draw(self, canvas: "Figure", look: Look, reach: Reach) -> None:
        """Draws it on an empty figure of matplotlib's."""


@dataclass(frozen=True)
class NotDrawn:
    """A figure that a model does not have, or that was not asked for, and why."""

    title: str
    reason: str


def shared_reach(drawings: Iterable[Drawing]) -> Reach:
    """Gives the ranges that hold the values of all of them."""
    found: Reach = {}
    for drawing in drawings:
        for axis, (low, high) in drawing.reach().items():
            lowest, highest = found.get(axis, (low, high))
            found[axis] = min(low, lowest), max(high, highest)
    return found


def in_words(names: Sequence[str]) -> str:
    """Writes "a", "a and b", or "a, b and c": of one name at least."""
    *most, last = names
    return f"{', '.join(most)} and {last}" if most else last
