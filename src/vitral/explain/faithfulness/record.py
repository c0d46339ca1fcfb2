"""What was found of each method on one model: the record of a scoring, and how it is read."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from vitral.explain.attribution.method import Method
from vitral.explain.faithfulness.curves import area
from vitral.explain.faithfulness.perturb import Perturbed
from vitral.explain.faithfulness.redrawn import HALF
from vitral.explain.faithfulness.removal import Fill
from vitral.explain.faithfulness.scored import FillScores, Scored
from vitral.explain.faithfulness.statistics import Estimate, Pair, compare, estimates, letters
from vitral.explain.faithfulness.verdict import Verdict


@dataclass(frozen=True)
class Faithfulness:
    """How faithful several methods are to one model, on the same images; the best comes first.

    Of a model with a mean pool, what is left after dropping is averaged. If it has no token besides the
    patches, there is nothing to read without them, and the last point of dropping is that of the mean fill.
    """

    split: str
    n: int  # images behind every number, but the randomization check's
    damaged: int  # images that could not be read
    redrawn_images: int  # images behind the randomization check
    removed: tuple[float, ...]  # shares of the patches that are gone, the points of a curve
    methods: tuple[Scored, ...]  # by SRG under the first fill, controls among them
    pairs: dict[Fill, tuple[Pair, ...]]  # of SRG
    default: str  # the method that is taken if none is named

    @property
    def fills(self) -> tuple[Fill, ...]:
        """What was in the place of patches, the first fill being the one that methods are ordered by."""
        return tuple(self.pairs)

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
        return {**asdict(self), "conclusions": self.conclusions()}

    def headings(self) -> tuple[str, ...]:
        """What the cells of `rows` are."""
        of_fills = [f"{name} {fill}" for fill in self.fills for name in ("SRG", "interval", "group")]
        return ("method", *of_fills, *(f"SaCo {fill}" for fill in self.fills), "redrawn half")

    def rows(self) -> list[tuple[str, ...]]:
        """A row a method: by fill SRG, its 95 % interval and group; SaCo; the randomization check."""
        return [
            (
                scored.method,
                *(cell for scores in scored.fills.values() for cell in _srg(scores)),
                *(f"{scores.saco.mean:+.2f}" for scores in scored.fills.values()),
                f"{scored.redrawn[HALF].mean:+.2f}" if HALF in scored.redrawn else "-",
            )
            for scored in self.methods
        ]

    def curve_rows(self) -> list[tuple[str, ...]]:
        """A row a method and fill: deletion, insertion and SaCo, each with its 95 % interval."""
        return [
            (
                scored.method,
                fill,
                *(_with_interval(of) for of in (scores.deletion, scores.insertion, scores.saco)),
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
        """What the numbers say, in sentences."""
        return Verdict(self.n, self.methods, self.pairs, self.default).sentences()


def _srg(scores: FillScores) -> tuple[str, str, str]:
    srg = scores.srg
    return f"{srg.mean:+.3f}", f"{srg.low:+.2f} to {srg.high:+.2f}", scores.group


def _with_interval(of: Estimate) -> str:
    return f"{of.mean:+.3f} ({of.low:+.2f} to {of.high:+.2f})"


def summarize(
    rows: Mapping[str, Method],
    perturbed: Mapping[Fill, Mapping[str, Perturbed]],
    seconds: Mapping[tuple[Fill, str], float],
    correlations: Mapping[str, Mapping[str, np.ndarray]],
    counts: list[int],
    **about: Any,
) -> Faithfulness:
    """Makes the record.

    Args:
        rows: the methods.
        perturbed: what each method's maps did to the images, by fill.
        seconds: that it took.
        correlations: of each method but the controls, by stage, an image each.
        counts: of the patches that are gone, the points of a curve.
        about: other fields of the record.
    """
    first, *_ = perturbed
    best_first = sorted(
        perturbed[first], key=lambda name: -float(_srg_N(perturbed[first][name], counts).mean())
    )
    found = {fill: _of_fill(of, counts, best_first) for fill, of in perturbed.items()}
    methods = [
        Scored(
            name,
            rows[name].is_control,
            {fill: _scores(found[fill], perturbed[fill][name], name, seconds[fill, name]) for fill in found},
            {stage: estimates(of[None])[0] for stage, of in correlations.get(name, {}).items()},
        )
        for name in best_first
    ]
    return Faithfulness(
        n=len(perturbed[first][best_first[0]].saco_R),
        removed=tuple(count / counts[-1] for count in counts),
        methods=(*methods, _reversed(methods)),
        pairs={fill: tuple(of.pairs) for fill, of in found.items()},
        **about,
    )


@dataclass(frozen=True)
class _OfFill:
    """The statistics of all methods under one fill."""

    by_name: dict[str, dict[str, Estimate]]
    pairs: list[Pair]
    groups: dict[str, str]


def _of_fill(of: Mapping[str, Perturbed], counts: list[int], names: list[str]) -> _OfFill:
    values = {
        "srg": np.stack([_srg_N(of[name], counts) for name in names]),
        "deletion": np.stack([area(of[name].most_first_RS, counts) for name in names]),
        "insertion": np.stack([area(of[name].least_first_RS, counts) for name in names]),
        "saco": np.stack([of[name].saco_R for name in names]),
    }
    by_metric = {metric: estimates(values_MN) for metric, values_MN in values.items()}
    by_name = {
        name: {metric: found[place] for metric, found in by_metric.items()}
        for place, name in enumerate(names)
    }
    pairs = compare(names, values["srg"])
    own_order = sorted(names, key=lambda name: -by_name[name]["srg"].mean)
    return _OfFill(by_name, pairs, letters(own_order, pairs))


def _srg_N(perturbed: Perturbed, counts: list[int]) -> np.ndarray:
    """The symmetric relevance gain (arXiv:2401.06654): the area between both curves, an image each."""
    return area(perturbed.least_first_RS, counts) - area(perturbed.most_first_RS, counts)


def _scores(found: _OfFill, perturbed: Perturbed, name: str, seconds: float) -> FillScores:
    deletion, insertion = perturbed.most_first_RS.mean(axis=0), perturbed.least_first_RS.mean(axis=0)[::-1]
    return FillScores(
        **found.by_name[name],
        group=found.groups[name],
        deletion_curve=tuple(deletion.tolist()),
        insertion_curve=tuple(insertion.tolist()),
        seconds=seconds,
    )


def _reversed(methods: list[Scored]) -> Scored:
    """The control that is the best map upside down: it needs no pass, for its curves are those of the best.

    What the best takes first, it takes last: the curves change places, and SRG and SaCo their sign.
    """
    best = next(scored for scored in methods if not scored.control)
    fills = {
        fill: FillScores(
            srg=_negative(of.srg),
            deletion=of.insertion,
            insertion=of.deletion,
            saco=_negative(of.saco),
            group="",
            deletion_curve=of.insertion_curve[::-1],
            insertion_curve=of.deletion_curve[::-1],
            seconds=0.0,
        )
        for fill, of in best.fills.items()
    }
    return Scored(f"{best.method}, reversed", True, fills, {})


def _negative(of: Estimate) -> Estimate:
    return Estimate(-of.mean, -of.high, -of.low)
