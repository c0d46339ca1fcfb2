"""What the numbers of a scoring say, in sentences: which methods differ, and what to distrust."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from vitral.explain.faithfulness.redrawn import PASSES_BELOW
from vitral.explain.faithfulness.removal import Fill
from vitral.explain.faithfulness.scored import Scored
from vitral.explain.faithfulness.statistics import Pair

_DOING: dict[Fill, str] = {"drop": "dropping tokens", "mean": "mean fill"}
_SHOWN = 3  # pairs in a sentence


@dataclass(frozen=True)
class Verdict:
    """Reads the fields of `record.Faithfulness` of these names."""

    n: int
    methods: Sequence[Scored]
    pairs: dict[Fill, tuple[Pair, ...]]
    default: str

    def sentences(self) -> list[str]:
        """A sentence on each question that the numbers answer."""
        asked = self._best(), *self._chance(), self._fills(), self._redrawn(), self._default()
        return [sentence for sentence in asked if sentence]

    def beats(self, fill: Fill, one: str, other: str) -> bool:
        """Whether one's SRG is higher beyond chance."""
        for pair in self.pairs[fill]:
            if {pair.first, pair.second} == {one, other} and pair.differ:
                return (pair.difference.mean > 0) == (pair.first == one)
        return False

    @property
    def _fill(self) -> Fill:
        return next(iter(self.pairs))

    @property
    def _judged(self) -> list[Scored]:
        return [scored for scored in self.methods if not scored.control]

    def _best(self) -> str:
        best, *others = self._judged
        srg = best.fills[self._fill].srg
        equals = [of.method for of in others if not self.beats(self._fill, best.method, of.method)]
        told = ", better than every other beyond chance" if others else ""
        if equals:
            told = f"; {self.n:,} images do not tell it from {_listed(equals)}"
        return (
            f"most faithful to this model by {_DOING[self._fill]}: {best.method}, SRG {srg.mean:.3f} "
            f"({srg.low:.2f} to {srg.high:.2f}){told}"
        )

    def _chance(self) -> Iterator[str]:
        """Whether the random map does what it must, and which methods do no better than the controls."""
        random = next(of for of in self.methods if of.method == "random")
        for fill, scores in random.fills.items():
            if 0 not in scores.srg:
                yield (
                    f"the random map's SRG by {_DOING[fill]} is not 0 ({scores.srg.low:.3f} to "
                    f"{scores.srg.high:.3f}), which chance does to one scoring in twenty: take more "
                    "images, or another seed"
                )
        for control in ("random", "centre"):
            poor = [of.method for of in self._judged if not self.beats(self._fill, of.method, control)]
            if poor:
                yield f"no better than the {control} control, beyond chance: {_listed(poor)}"

    def _fills(self) -> str:
        if len(self.pairs) < 2:
            return ""
        first, second, *_ = self.pairs
        names = [scored.method for scored in self._judged]
        opposed = [
            f"{_DOING[first]} puts {one} before {other}, {_DOING[second]} {other} before {one}"
            for one in names
            for other in names
            if self.beats(first, one, other) and self.beats(second, other, one)
        ]
        if opposed:
            more = f"; and {len(opposed) - _SHOWN} more pairs" if len(opposed) > _SHOWN else ""
            listed = "; ".join(opposed[:_SHOWN])
            return f"the fills order the methods differently, beyond chance: {listed}{more}"
        best = max(self._judged, key=lambda scored: scored.fills[second].srg.mean).method
        same = (
            "put the same method first" if best == names[0] else f"differ in the first ({best} by the second)"
        )
        return f"{_DOING[first]} and {_DOING[second]} {same}, and no two in opposite orders beyond chance"

    def _redrawn(self) -> str:
        failed = [of.method for of in self._judged if of.redrawn and not of.shows_what_was_learned]
        if not failed:
            return ""
        return (
            f"with the upper half of the weights redrawn the maps stay much the same (rank correlation "
            f"{PASSES_BELOW} or more), so they show less of what the model learned: {_listed(failed)}"
        )

    def _default(self) -> str:
        """How the method that is taken if none is named does here."""
        default = next((of for of in self._judged if of.method == self.default), None)
        if default is None:
            return ""
        better = [of.method for of in self._judged if self.beats(self._fill, of.method, self.default)]
        place = f"is beaten here by {_listed(better)}" if better else "is beaten by no other here"
        checked = "passes" if default.shows_what_was_learned else "fails"
        return f"{self.default}, the default, {place}, and {checked} the randomization check"


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
