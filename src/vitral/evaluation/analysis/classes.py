"""`ByClass`: recall and precision of each class with intervals, confusion, the most confused pairs."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from vitral.evaluation.analysis.answers import Answers
from vitral.evaluation.intervals import Share


@dataclass(frozen=True)
class ClassSummary:
    """How well one class is recognised."""

    name: str
    images: int  # that show it
    recall: Share  # of the images that show it, those whose answer says so
    precision: Share  # of the answers that say so, those that are right


@dataclass(frozen=True)
class ConfusedPair:
    """Images of one class that were taken for another."""

    truth: str
    taken_for: str
    share: Share  # of the images of the class `truth`


@dataclass(frozen=True)
class ByClass:
    """The answers by class, in the order of the model's classes.

    Where an image shows any number of classes, each class is a question of its own: there is no confusion
    of one with another, `confusion` is None and `pairs` is empty.
    """

    classes: tuple[ClassSummary, ...]
    pairs: tuple[ConfusedPair, ...]  # the most images first, then the largest share, then by name
    # Images by true class (rows) and answer (columns), a scipy.sparse.csr_array (L, L).
    confusion: Any = field(compare=False)

    @property
    def normalised(self) -> Any:
        """Give the confusion as shares of each true class, csr (L, L); 0 for classes without images."""
        from scipy.sparse import diags_array

        counts = self.confusion.sum(axis=1)
        return (diags_array(1 / np.maximum(counts, 1)) @ self.confusion).tocsr()


def by_class(answers: Answers) -> ByClass:
    """Count right and wrong answers by class."""
    if answers.multi_label:
        shown, said = answers.labels, answers.outcomes.answers
        right = (shown & said).sum(0)
        return ByClass(_summaries(answers.classes, right, shown.sum(0), said.sum(0)), (), None)
    confusion = answers.evaluation.counts
    right, shown, said = confusion.diagonal(), confusion.sum(axis=1), confusion.sum(axis=0)
    summaries = _summaries(answers.classes, right, shown, said)
    return ByClass(summaries, _pairs(answers.classes, confusion, shown), confusion)


def _summaries(
    names: tuple[str, ...], right: np.ndarray, shown: np.ndarray, said: np.ndarray
) -> tuple[ClassSummary, ...]:
    rows = zip(names, right.tolist(), shown.tolist(), said.tolist(), strict=True)
    return tuple(
        ClassSummary(name, images, Share.of(count, images), Share.of(count, answers))
        for name, count, images, answers in rows
    )


def _pairs(names: tuple[str, ...], confusion: Any, shown: np.ndarray) -> tuple[ConfusedPair, ...]:
    cells = confusion.tocoo()
    truths, others = cells.coords
    found = [
        ConfusedPair(names[truth], names[other], Share.of(count, shown[truth]))
        for truth, other, count in zip(truths.tolist(), others.tolist(), cells.data.tolist(), strict=True)
        if truth != other and count
    ]
    return tuple(
        sorted(found, key=lambda pair: (-pair.share.count, pair.share.total, pair.truth, pair.taken_for))
    )
