"""What was found of each method on one model: the record of a scoring, and how it is read."""

from dataclasses import asdict, dataclass
from typing import Any

from vitral.explain.faithfulness.redrawn import HALF
from vitral.explain.faithfulness.removal import Fill
from vitral.explain.faithfulness.scored import Scored
from vitral.explain.faithfulness.statistics import Estimate, Pair
from vitral.explain.faithfulness.verdict import Verdict


@dataclass(frozen=True)
class Faithfulness:
    """How faithful several methods are to one model, on the same images; the best comes first."""

    split: str
    n: int  # images behind every number, but the randomization check's
    damaged: int  # images that could not be read
    redrawn_images: int  # images behind the randomization check
    removed: tuple[float, ...]  # shares of the patches that are gone, the points of a curve
    methods: tuple[Scored, ...]  # by SRG under the first fill, controls among them
    pairs: dict[Fill, tuple[Pair, ...]]  # of SRG
    saco_fill: Fill  # what was in the place of SaCo's groups
    default: str  # the method that is taken if none is named
    notes: tuple[str, ...]  # what removing patches means for such a model

    @property
    def fills(self) -> tuple[Fill, ...]:
        """What was in the place of patches, the first fill being the one that methods are ordered by."""
        return tuple(self.pairs)

    @property
    def drop_share(self) -> float | None:
        """The time that the curves took by dropping, as a share of that by mean fill; None without both."""
        drop, mean = (
            sum(scored.fills[fill].seconds for scored in self.methods if fill in scored.fills)
            for fill in ("drop", "mean")
        )
        return drop / mean if drop and mean else None

    def __getitem__(self, method: str) -> Scored:
        return next(scored for scored in self.methods if scored.method == method)

    def __repr__(self) -> str:
        lines = [f"<Faithfulness of {len(self.methods)} methods, controls among them, on {self.n:,} images"]
        for cells in [self.headings(), *self.rows()]:
            lines.append(
                "  ".join(f"{cell:{'<14' if place == 0 else '>14'}}" for place, cell in enumerate(cells))
            )
        return "\n".join([*lines, *self.conclusions()]) + ">"

    def to_dict(self) -> dict[str, Any]:
        """All of it, as JSON can write it."""
        return {**asdict(self), "drop_share": self.drop_share, "conclusions": self.conclusions()}

    def headings(self) -> tuple[str, ...]:
        """What the cells of `rows` are."""
        of_fills = [f"{name} {fill}" for fill in self.fills for name in ("SRG", "interval", "group")]
        return ("method", *of_fills, f"SaCo {self.saco_fill}", "interval SaCo", "redrawn half")

    def rows(self) -> list[tuple[str, ...]]:
        """A row a method: by fill SRG, its 95 % interval and group; SaCo; the randomization check."""
        return [
            (
                scored.method,
                *(cell for of in scored.fills.values() for cell in (*_interval(of.srg), of.group)),
                *_interval(scored.saco),
                f"{scored.redrawn[HALF].mean:+.2f}" if HALF in scored.redrawn else "-",
            )
            for scored in self.methods
        ]

    def curve_rows(self) -> list[tuple[str, ...]]:
        """A row a method and fill: deletion and insertion, each with its 95 % interval."""
        return [
            (
                scored.method,
                fill,
                *(cell for of in (scores.deletion, scores.insertion) for cell in _interval(of)),
            )
            for scored in self.methods
            for fill, scores in scored.fills.items()
        ]

    def redrawn_rows(self) -> list[tuple[str, ...]]:
        """A row a method: the rank correlation of its maps with those after each stage of redrawing."""
        return [
            (scored.method, *(f"{of.mean:+.2f}" for of in scored.redrawn.values()))
            for scored in self.methods
            if scored.redrawn
        ]

    def conclusions(self) -> list[str]:
        """What the numbers say, in sentences; then what removing patches means for such a model."""
        return [*Verdict(self.n, self.methods, self.pairs, self.default).sentences(), *self.notes]


def _interval(of: Estimate) -> tuple[str, str]:
    return f"{of.mean:+.3f}", f"{of.low:+.2f} to {of.high:+.2f}"
