"""Which labels of held-out images are likely wrong: confident learning (arXiv:1911.00068)."""

from dataclasses import dataclass, field

import numpy as np

from vitral.evaluation.analysis.answers import Answers
from vitral.evaluation.analysis.notable import ImageAnswer


@dataclass(frozen=True)
class SuspectedLabel:
    """An image whose label is likely wrong."""

    image: ImageAnswer
    given: str  # its label; of any number of classes an image, the class in question
    suggested: str  # the class that it more likely shows; "not " and the class where it likely does not
    self_confidence: float  # the probability that the model gives the label as it is: small is suspicious
    margin: float  # that, minus the probability of the likeliest other answer, in -1..1


@dataclass(frozen=True)
class LabelErrors:
    """The suspected labels, the least self-confidence first."""

    suspects: tuple[SuspectedLabel, ...]
    images: int  # that were looked at
    classes: tuple[str, ...]
    thresholds: np.ndarray = field(repr=False)  # (L,), the mean probability of a class on its own images
    # Confident joint (L, L): images by label (rows) and by the class that they confidently show; of any
    # number of classes an image, (L, 2, 2), by whether the label and the model say that a class is shown.
    joint: np.ndarray = field(repr=False)
    held_out: bool | None  # as `Answers.held_out`
    note: str  # a sentence: how far to believe it


def label_errors(answers: Answers) -> LabelErrors:
    """Find the images whose labels are likely wrong."""
    raise NotImplementedError
