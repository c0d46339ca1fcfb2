"""From what was seen of each image to the record of a scoring: means, intervals, tests, groups."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from vitral.explain.attribution.method import Method
from vitral.explain.faithfulness.curves import area
from vitral.explain.faithfulness.perturb import Curves
from vitral.explain.faithfulness.record import Faithfulness
from vitral.explain.faithfulness.removal import Fill
from vitral.explain.faithfulness.scored import FillScores, Scored
from vitral.explain.faithfulness.statistics import Estimate, Pair, compare, estimates, letters


@dataclass(frozen=True)
class Found:
    """What was seen of each method on N images."""

    curves: Mapping[Fill, Mapping[str, Curves]]
    saco: Mapping[str, np.ndarray]  # (N,)
    correlations: Mapping[str, Mapping[str, np.ndarray]]  # of all but the controls, by stage, an image each
    seconds: Mapping[tuple[Fill, str], float]  # that the curves took


@dataclass(frozen=True)
class _OfFill:
    """The statistics of all methods under one fill."""

    by_name: dict[str, dict[str, Estimate]]
    pairs: list[Pair]
    groups: dict[str, str]


def summarize(rows: Mapping[str, Method], found: Found, counts: Sequence[int], **about: Any) -> Faithfulness:
    """Makes the record.

    Args:
        rows: the methods.
        found: what was seen.
        counts: of the patches that are gone, the points of a curve.
        about: other fields of the record.
    """
    first, *_ = found.curves
    names = sorted(rows, key=lambda name: -float(_srg_N(found.curves[first][name], counts).mean()))
    of_fills = {fill: _of_fill(of, counts, names) for fill, of in found.curves.items()}
    saco = dict(zip(names, estimates(np.stack([found.saco[name] for name in names])), strict=True))
    methods = [
        Scored(
            name,
            rows[name].is_control,
            {fill: _scores(of_fills[fill], found, fill, name) for fill in of_fills},
            saco[name],
            {stage: estimates(of[None])[0] for stage, of in found.correlations.get(name, {}).items()},
        )
        for name in names
    ]
    return Faithfulness(
        n=len(found.saco[names[0]]),
        removed=tuple(count / counts[-1] for count in counts),
        methods=(*methods, _reversed(methods)),
        pairs={fill: tuple(of.pairs) for fill, of in of_fills.items()},
        **about,
    )


def _of_fill(of: Mapping[str, Curves], counts: Sequence[int], names: Sequence[str]) -> _OfFill:
    values = {
        "srg": np.stack([_srg_N(of[name], counts) for name in names]),
        "deletion": np.stack([area(of[name].most_first_RS, counts) for name in names]),
        "insertion": np.stack([area(of[name].least_first_RS, counts) for name in names]),
    }
    by_metric = {metric: estimates(values_MN) for metric, values_MN in values.items()}
    by_name = {
        name: {metric: found[place] for metric, found in by_metric.items()}
        for place, name in enumerate(names)
    }
    pairs = compare(names, values["srg"])
    own_order = sorted(names, key=lambda name: -by_name[name]["srg"].mean)
    return _OfFill(by_name, pairs, letters(own_order, pairs))


def _srg_N(curves: Curves, counts: Sequence[int]) -> np.ndarray:
    """The symmetric relevance gain (arXiv:2401.06654): the area between both curves, an image each."""
    return area(curves.least_first_RS, counts) - area(curves.most_first_RS, counts)


def _scores(of: _OfFill, found: Found, fill: Fill, name: str) -> FillScores:
    curves = found.curves[fill][name]
    return FillScores(
        **of.by_name[name],
        group=of.groups[name],
        deletion_curve=tuple(curves.most_first_RS.mean(axis=0).tolist()),
        insertion_curve=tuple(curves.least_first_RS.mean(axis=0)[::-1].tolist()),
        seconds=found.seconds[fill, name],
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
            group="",
            deletion_curve=of.insertion_curve[::-1],
            insertion_curve=of.deletion_curve[::-1],
            seconds=0.0,
        )
        for fill, of in best.fills.items()
    }
    return Scored(
        f"{best.method}, reversed", control=True, fills=fills, saco=_negative(best.saco), redrawn={}
    )


def _negative(of: Estimate) -> Estimate:
    return Estimate(-of.mean, -of.high, -of.low)
