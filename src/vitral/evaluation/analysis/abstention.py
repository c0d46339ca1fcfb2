"""What is won where a model may say "I do not know": risk against coverage, and a threshold for an accuracy.

The n images are answered from the surest on; those below a threshold of confidence go to a person.
"""

import math
from dataclasses import dataclass, field, replace

import numpy as np

from vitral.evaluation.analysis.answers import Answers
from vitral.evaluation.intervals import Share
from vitral.evaluation.single_label import SingleLabelOutcomes

_SEED = 0
# Coverages that are tried for a threshold with an assurance; each more costs a little of it.
_TRIED = 20
_ASSURANCE = 0.95


@dataclass(frozen=True)
class RiskCoverage:
    """The share of wrong answers (risk) by the share of images that are answered (coverage).

    One point for each confidence that there is: images of the same confidence are answered together.
    """

    coverage: np.ndarray = field(repr=False)  # (m,), rising to 1
    risk: np.ndarray = field(repr=False)  # (m,)
    confidence: np.ndarray = field(repr=False)  # (m,), falling: the threshold that gives the coverage
    # The mean risk over the coverages 1/n, 2/n .. 1 (Geifman et al., arXiv:1805.08206, §3); where images
    # have the same confidence, its expectation over their orders.
    area: float
    least_area: float  # of the best order: all right answers before all wrong ones
    risk_of_all: float  # of answering every image, and the area of a random order

    def at_most(self, points: int) -> "RiskCoverage":
        """Give the curve with so many points at most, evenly over the coverage, for a drawing."""
        if len(self.coverage) <= points:
            return self
        places = np.searchsorted(self.coverage, np.linspace(self.coverage[0], 1, points))
        places = np.unique(np.minimum(places, len(self.coverage) - 1))
        return replace(
            self,
            coverage=self.coverage[places],
            risk=self.risk[places],
            confidence=self.confidence[places],
        )


@dataclass(frozen=True)
class Threshold:
    """From which confidence on the answers are as accurate as wished.

    A threshold that is judged on the images that it was chosen on looks better than it is. So it is chosen
    on one half of the images, drawn at random, and `accuracy` and `coverage` are of the other half; their
    intervals then hold for new images of the same kind. (Tenfold, each judged by a threshold of the others,
    the interval held the truth in 86 % of draws of 100 images, docs/log.md, 2026-11-26.)
    """

    wished: float  # accuracy
    confidence: float | None  # the least that serves on the half that chose it; None: no threshold does
    chosen_accuracy: float | None  # of that half: optimistic
    accuracy: Share  # of the answers at or above `confidence` in the other half, those that are right
    coverage: Share  # of the other half's images, those that are answered
    # A threshold whose answers on new images of the same kind are as accurate as wished, with an assurance
    # of 95 %; None: these images are too few to say so of any.
    assured_confidence: float | None
    assured_coverage: float | None  # of these images


def risk_coverage(answers: Answers) -> RiskCoverage | None:
    """Compute risk against coverage; None where an image shows any number of classes.

    No one confidence then says how sure a model is of an image.
    """
    outcomes = answers.outcomes
    return _curve(outcomes.confidences, outcomes.wrong) if isinstance(outcomes, SingleLabelOutcomes) else None


def threshold_for(answers: Answers, wished: float) -> Threshold | None:
    """Find the threshold of confidence for a wished accuracy in 0..1; None as of `risk_coverage`."""
    outcomes = answers.outcomes
    if not isinstance(outcomes, SingleLabelOutcomes):
        return None
    return _threshold(outcomes.confidences, ~outcomes.wrong, wished)


def _steps(confidences: np.ndarray, wrong: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Each confidence from the highest on, and how many images and errors are at it or above."""
    levels, places = np.unique(-confidences, return_inverse=True)
    counts = np.bincount(places, minlength=len(levels))
    errors = np.bincount(places, wrong.astype(float), len(levels))
    return -levels, np.cumsum(counts), np.cumsum(errors)


def _curve(confidences: np.ndarray, wrong: np.ndarray) -> RiskCoverage:
    n = len(wrong)
    levels, counts, errors = _steps(confidences, wrong)
    answered = np.arange(1, n + 1)
    # Among images of the same confidence, errors come evenly in expectation.
    expected = np.interp(answered, np.concatenate([[0], counts]), np.concatenate([[0], errors]))
    at_best = np.maximum(answered - (n - wrong.sum()), 0)
    return RiskCoverage(
        counts / n,
        errors / counts,
        levels,
        float((expected / answered).mean()),
        float((at_best / answered).mean()),
        float(wrong.mean()),
    )


def _threshold(confidences: np.ndarray, correct: np.ndarray, wished: float) -> Threshold:
    n = len(correct)
    choosing, judging = np.array_split(np.random.default_rng(_SEED).permutation(n), 2)
    confidence = _least_serving(confidences[choosing], correct[choosing], wished)
    least = math.inf if confidence is None else confidence
    answered = judging[confidences[judging] >= least]
    assured = _assured(confidences, correct, wished)
    return Threshold(
        wished,
        confidence,
        None if confidence is None else float(correct[choosing][confidences[choosing] >= least].mean()),
        Share.of(correct[answered].sum(), len(answered)),
        Share.of(len(answered), len(judging)),
        assured,
        None if assured is None else float((confidences >= assured).mean()),
    )


def _least_serving(confidences: np.ndarray, correct: np.ndarray, wished: float) -> float | None:
    """The least confidence at and above which these answers are as accurate as wished."""
    levels, counts, errors = _steps(confidences, ~correct)
    serving = np.flatnonzero(counts - errors >= wished * counts)
    return float(levels[serving[-1]]) if len(serving) else None


def _assured(confidences: np.ndarray, correct: np.ndarray, wished: float) -> float | None:
    """The least confidence that serves on new images too, with an assurance of 95 %.

    As in selective guaranteed risk (Geifman and El-Yaniv, arXiv:1705.08500, §3): Clopper and Pearson's
    bound of the accuracy, its error divided by the number of thresholds that are tried. Those are evenly
    spaced coverages, which no label decides.
    """
    from scipy.stats import beta

    n = len(correct)
    ranks = np.unique(np.ceil(np.linspace(0, n, _TRIED + 1)[1:]).astype(int))
    falling = np.sort(confidences)[::-1]
    for rank in ranks[::-1]:
        answered = confidences >= falling[rank - 1]
        right = int(correct[answered].sum())
        wrong = int(answered.sum()) - right
        least = beta.ppf((1 - _ASSURANCE) / _TRIED, right, wrong + 1) if right else 0.0
        if least >= wished:
            return float(falling[rank - 1])
    return None
