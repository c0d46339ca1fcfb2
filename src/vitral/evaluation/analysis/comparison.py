"""`Comparison`: two models on the same images, image by image; and how two recipes differ."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from vitral.evaluation.analysis.answers import Answers
from vitral.evaluation.diagnosis.paired_tests import mcnemar
from vitral.evaluation.mistakes import named
from vitral.runtime.errors import VitralError


@dataclass(frozen=True)
class Difference:
    """How much more of the same images a second model has right than a first."""

    images: int
    first: float  # share of them that is right
    second: float
    gained: int  # images that the second alone has right
    lost: int  # images that the first alone has right
    value: float  # second - first
    low: float  # of a 95 % interval (Agresti and Min, 2005)
    high: float
    p_value: float  # McNemar's exact test

    @property
    def beyond_chance(self) -> bool:
        """Whether McNemar's test rejects at 5 % that both are equally good."""
        return self.p_value < 0.05


@dataclass(frozen=True)
class Comparison:
    """A second model beside a first, on the images that both judged."""

    all: Difference
    by_class: tuple[tuple[str, Difference], ...]  # of the classes with images, in the first model's order
    left_out: int  # images that only one of them judged


def compare(first: Answers, second: Answers) -> Comparison:
    """Compare two models on the images that both judged; of several classes an image, all must be right.

    Raises:
        VitralError: if they judged no image in common, or its truth is not the same.
    """
    ours, theirs = _by_name(first), _by_name(second)
    common = [name for name in ours if name in theirs]
    if not common:
        raise VitralError("the two runs judged not one image in common; give both the same DATA")
    rows, others = (np.array([of[name] for name in common]) for of in (ours, theirs))
    _refuse_other_truth(first, second, rows, others, common)
    right, other_right = ~first.outcomes.wrong[rows], ~second.outcomes.wrong[others]
    labels = first.labels[rows]
    shown = labels if first.multi_label else np.eye(len(first.classes), dtype=bool)[labels]
    by_class = tuple(
        (name, difference(right[of_class], other_right[of_class]))
        for name, of_class in zip(first.classes, shown.T, strict=True)
        if of_class.any()
    )
    left_out = len(first) + len(second) - 2 * len(common)
    return Comparison(difference(right, other_right), by_class, left_out)


def difference(first: np.ndarray, second: np.ndarray) -> Difference:
    """Compare which images are right, (n,) each, with the interval for paired shares.

    Half an image is added to each of the four outcomes of a pair, so that the interval holds its 95 % of
    few images too (Agresti and Min, Statistics in Medicine 24, 2005, §4).
    """
    n = len(first)
    gained, lost = int((~first & second).sum()), int((first & ~second).sum())
    more, fewer, total = gained + 0.5, lost + 0.5, n + 2
    centre = (more - fewer) / total
    reach = 1.959964 * np.sqrt(more + fewer - (more - fewer) ** 2 / total) / total
    low, high = max(centre - reach, -1.0), min(centre + reach, 1.0)
    shares = float(first.mean()), float(second.mean())
    value = (gained - lost) / n
    return Difference(n, *shares, gained, lost, value, float(low), float(high), mcnemar(gained, lost))


def recipe_differences(recipes: Sequence[Mapping[str, Any]]) -> dict[str, tuple[Any, ...]]:
    """Find the settings in which recipes differ, with the value of each; None where one has none."""
    names = sorted({name for recipe in recipes for name in recipe})
    values = {name: tuple(recipe.get(name) for recipe in recipes) for name in names}
    return {name: of for name, of in values.items() if any(value != of[0] for value in of)}


def _by_name(answers: Answers) -> dict[str, int]:
    return {answers.name(position): position for position in range(len(answers))}


def _refuse_other_truth(
    first: Answers, second: Answers, rows: np.ndarray, others: np.ndarray, names: Sequence[str]
) -> None:
    for row, other, name in zip(rows, others, names, strict=True):
        truth, other_truth = (
            named(answers.labels[place], answers.classes)
            for answers, place in ((first, row), (second, other))
        )
        if truth != other_truth:
            raise VitralError(
                f"{name} is {truth} for the one run and {other_truth} for the other; give both the same DATA"
            )
