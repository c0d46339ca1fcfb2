"""`Reliability`: whether the probabilities mean what they say, as the bins of a reliability diagram."""

from dataclasses import dataclass

import numpy as np

from vitral.evaluation.analysis.answers import Answers
from vitral.evaluation.intervals import Share
from vitral.evaluation.single_label import CALIBRATION_BINS, CalibrationBins, SingleLabelOutcomes


@dataclass(frozen=True)
class ReliabilityBin:
    """The answers whose probability is above `low` and at most `high`."""

    low: float
    high: float
    confidence: float | None  # mean probability; None: there is no such answer
    accuracy: Share  # of those answers, the right ones


@dataclass(frozen=True)
class Reliability:
    """The bins of a reliability diagram (Niculescu-Mizil and Caruana, 2005).

    Of one class an image, a question is whether the model's answer is right; of any number of classes,
    whether an image shows a class, for each image and class.
    """

    bins: tuple[ReliabilityBin, ...]
    error: float  # the expected calibration error (arXiv:1706.04599, eq. 3), as `Evaluation.ece`
    questions: int


def reliability(answers: Answers) -> Reliability:
    """Sort the answers by their probability."""
    outcomes = answers.outcomes
    if isinstance(outcomes, SingleLabelOutcomes):
        found = CalibrationBins.of(outcomes.confidences, ~outcomes.wrong)
    else:
        found = CalibrationBins.of(answers.probabilities.ravel(), answers.labels.ravel())
    edges = np.linspace(0, 1, CALIBRATION_BINS + 1).tolist()
    columns = found.counts.tolist(), found.confidences.tolist(), found.correct.tolist()
    bins = tuple(
        ReliabilityBin(low, high, confidence / count if count else None, Share.of(right, count))
        for low, high, count, confidence, right in zip(edges, edges[1:], *columns, strict=False)
    )
    return Reliability(bins, found.error, int(found.counts.sum()))
