"""Which labels of held-out images are likely wrong: confident learning (Northcutt et al., arXiv:1911.00068).

The package cleanlab finds the same images (`tests/test_label_errors.py`). It is not called here, for it would
bring pandas along and two seconds of imports for what is a mean, a comparison and a count.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from vitral.evaluation.analysis.answers import Answers
from vitral.evaluation.analysis.notable import ImageAnswer, image_answers
from vitral.evaluation.multi_label import THRESHOLD

_ROUNDING = 1e-6
_NOTES = {
    True: "The model never learnt from these images, so their labels had no part in its answers.",
    None: (
        "No record says whether the model learnt from these images. A wrong label that it learnt is not "
        "found here."
    ),
    False: (
        "The model learnt from some of these images, and their wrong labels with them: such labels are not "
        "found here."
    ),
}


@dataclass(frozen=True)
class SuspectedLabel:
    """An image whose label is likely wrong."""

    image: ImageAnswer
    # Its label and the class that it confidently shows; of any number of classes an image, one class is
    # in question, and the two are "dog" and "not dog", or the other way round.
    given: str
    suggested: str
    self_confidence: float  # the probability that the model gives the label as it is: small is suspicious
    margin: float  # that, minus the probability of the likeliest other answer, in -1..1


@dataclass(frozen=True)
class LabelErrors:
    """The suspected labels, the least self-confidence first."""

    suspects: tuple[SuspectedLabel, ...]
    images: int  # that were looked at
    classes: tuple[str, ...]
    thresholds: np.ndarray = field(
        repr=False
    )  # (L,), of the probability; infinite for a class without images
    # Confident joint (L, L): images by label (rows) and by the class that they confidently show; of any
    # number of classes an image, (L, 2, 2), by whether the label and the model say that a class is shown.
    joint: np.ndarray = field(repr=False)
    share: float  # of all labels, those that are wrong by estimate, more than can be named (eq. 3)
    held_out: bool | None  # as `Answers.held_out`

    @property
    def note(self) -> str:
        """Say in a sentence how far to believe it."""
        return _NOTES[self.held_out]


class Doubt(NamedTuple):
    """A label that is likely wrong, by position and number; its fields are as of `SuspectedLabel`."""

    position: int  # among the images
    given: str
    suggested: str
    self_confidence: float
    margin: float


class Doubts(NamedTuple):
    """The labels that are likely wrong, and what they were found by, as of `LabelErrors`."""

    doubts: list[Doubt]  # the least self-confidence first
    thresholds: np.ndarray
    joint: np.ndarray
    share: float


def label_errors(answers: Answers) -> LabelErrors:
    """Find the images whose labels are likely wrong by a model's answers, as `doubtful_labels` says."""
    found = doubtful_labels(answers.labels, answers.probabilities, answers.classes)
    images = image_answers(answers, [doubt.position for doubt in found.doubts])
    suspects = tuple(
        SuspectedLabel(image, *doubt[1:]) for image, doubt in zip(images, found.doubts, strict=True)
    )
    thresholds, joint, share = found[1:]
    return LabelErrors(suspects, len(answers), answers.classes, thresholds, joint, share, answers.held_out)


def doubtful_labels(labels: np.ndarray, probabilities_NL: np.ndarray, classes: Sequence[str]) -> Doubts:
    """Find the labels that are likely wrong, by probabilities that the labels had no part in.

    A class's threshold is the mean probability that the images of its label get; an image confidently
    shows the likeliest of the classes whose thresholds it reaches (§3.1, eq. 1 and 2). Suspected are the
    images that confidently show another class than their label, unless the model's answer is the label.
    Of any number of classes an image, that is done for each class with the two answers yes and no.

    Args:
        labels: (n,) indices into the classes, or (n, L) of which of them an image shows.
        probabilities_NL: of each class.
        classes: their names.
    """
    of_kind = _of_several if labels.ndim == 2 else _of_one
    doubts, thresholds, joint, wrong = of_kind(labels, probabilities_NL, classes)
    doubts.sort(key=lambda doubt: doubt.self_confidence)
    return Doubts(doubts, thresholds, joint, min(wrong / max(labels.size, 1), 1.0))


def confident_classes(probabilities_NL: np.ndarray, labels_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Find the class that each image confidently shows (n,), -1 for none, and the thresholds (L,).

    The threshold of a class without images is infinite.
    """
    counts = np.bincount(labels_N, minlength=probabilities_NL.shape[1])
    own = probabilities_NL[np.arange(len(labels_N)), labels_N].astype(float)
    sums = np.bincount(labels_N, own, len(counts))
    thresholds_L = np.where(counts > 0, sums / np.maximum(counts, 1), np.inf)
    # Where all images of a class have the same probability, each reaches the mean, however it is rounded.
    reached = np.where(probabilities_NL >= thresholds_L - _ROUNDING, probabilities_NL, -np.inf)
    likeliest = reached.argmax(1)
    return np.where(np.isfinite(reached.max(1)), likeliest, -1), thresholds_L


def confident_joint(labels_N: np.ndarray, shown_N: np.ndarray, num_classes: int) -> np.ndarray:
    """Count the images by label (rows) and by the class that they confidently show, (L, L); eq. 1."""
    sure = shown_N >= 0
    joint = np.zeros((num_classes, num_classes), dtype=np.int64)
    np.add.at(joint, (labels_N[sure], shown_N[sure]), 1)
    return joint


def _wrong_labels(joint: np.ndarray, counts: np.ndarray) -> float:
    """How many labels are wrong, with each row of the joint scaled to the images of its label (eq. 3)."""
    sure = joint.sum(1)
    right = np.where(sure > 0, joint.diagonal() / np.maximum(sure, 1), 1.0)
    return float((counts * (1 - right)).sum())


_Found = tuple[list[Doubt], np.ndarray, np.ndarray, float]


def _of_one(labels: np.ndarray, probabilities_NL: np.ndarray, names: Sequence[str]) -> _Found:
    shown, thresholds = confident_classes(probabilities_NL, labels)
    joint = confident_joint(labels, shown, len(names))
    doubted = (shown >= 0) & (shown != labels) & (probabilities_NL.argmax(1) != labels)
    doubts = []
    for position in np.flatnonzero(doubted).tolist():
        label, own = labels[position], probabilities_NL[position].copy()
        confidence, own[label] = float(own[label]), -np.inf
        margin = confidence - float(own.max())
        doubts.append(Doubt(position, names[label], names[shown[position]], confidence, margin))
    return doubts, thresholds, joint, _wrong_labels(joint, np.bincount(labels, minlength=len(names)))


def _of_several(labels_NL: np.ndarray, probabilities_NL: np.ndarray, names: Sequence[str]) -> _Found:
    doubts, thresholds, joints, wrong = [], [], [], 0.0
    for place, name in enumerate(names):
        labels = labels_NL[:, place].astype(np.int64)
        yes = probabilities_NL[:, place]
        both = np.stack([1 - yes, yes], axis=1)
        shown, of_class = confident_classes(both, labels)
        joints.append(confident_joint(labels, shown, 2))
        thresholds.append(of_class[1])
        wrong += _wrong_labels(joints[-1], np.bincount(labels, minlength=2))
        doubted = (shown >= 0) & (shown != labels) & ((yes > THRESHOLD) != labels)
        words = (f"not {name}", name)
        for position in np.flatnonzero(doubted).tolist():
            confidence = float(both[position, labels[position]])
            given, suggested = words[labels[position]], words[shown[position]]
            doubts.append(Doubt(position, given, suggested, confidence, 2 * confidence - 1))
    return doubts, np.array(thresholds), np.array(joints), wrong
