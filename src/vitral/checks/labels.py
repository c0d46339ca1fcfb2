"""Labels that are likely wrong, by confident learning on what probes say of images that they never learnt.

Images are dealt to folds; a linear probe on a model's features learns from the other folds and answers for
each. Images that show the same picture are in one fold, else their label would answer for itself.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from vitral.checks.findings import Finding, Kind, Subject
from vitral.data.subsets import rows_by_class
from vitral.evaluation.analysis.label_errors import Doubts, doubtful_labels
from vitral.evaluation.probing.linear import PENALTIES, LinearHead

FOLDS = 5
# The penalty is chosen on so many images, half of them to fit to.
_CHOSEN_ON = 6000
_TRIED = PENALTIES[2::2]
# Share of each class that the second round does without: on CIFAR-10 with 5 % of the labels changed the area
# under precision and recall rose by 0.01 to 0.02 (docs/log.md, 2026-11-27).
_TRIMMED, _ROUNDS = 0.05, 2
# Of the labels, that probes must agree with before images are left out on their word. With 5 % changed, 84 %
# of what they named was wrong where they agreed with 88 % of the labels, and 46 % where with 82 % (ibid.).
TRUSTED = 0.85


@dataclass(frozen=True)
class LabelSearch:
    """What the probes say of n images, each by a probe that never learnt from it."""

    rows: np.ndarray  # (n,) of the images
    labels: np.ndarray  # (n,) places in `classes`, or (n, L) of which of them each shows
    classes: tuple[str, ...]  # those with images enough
    probabilities: np.ndarray  # (n, L)
    doubts: Doubts

    @property
    def trusted(self) -> bool:
        """Whether to train without what it names; of several labels of an image, most are right."""
        return self.labels.ndim == 1 and self.accuracy >= TRUSTED

    @property
    def accuracy(self) -> float:
        """Say how often the likeliest class is the label; of several labels, how often each is right."""
        if self.labels.ndim == 2:
            return float(((self.probabilities > 0.5) == self.labels).mean())
        return float((self.probabilities.argmax(1) == self.labels).mean())


def search_labels(
    vectors_ND: Tensor,
    rows: np.ndarray,
    subject: Subject,
    groups: np.ndarray,
    *,
    seed: int = 0,
    on_folds: Callable[[int, int], None] = lambda *_: None,
) -> LabelSearch | str:
    """Find the labels that are likely wrong; or say why none can be.

    Args:
        vectors_ND: a model's features of the images.
        rows: which images these are, (N,).
        subject: the images.
        groups: a number for each image of the subject; those of one number are not set apart.
        seed: of the folds.
        on_folds: told how many probes are fitted, of how many.
    """
    labels, groups = subject.split.labels[rows], groups[rows]
    _, firsts, groups = np.unique(groups, return_index=True, return_inverse=True)
    shown = labels if labels.ndim == 2 else np.eye(len(subject.data.classes), dtype=bool)[labels]
    enough = np.flatnonzero(shown[firsts].sum(0) >= FOLDS)
    if labels.ndim == 1:
        kept = np.flatnonzero(np.isin(labels, enough))
        labels = np.searchsorted(enough, labels)
    else:
        kept, labels = np.arange(len(labels)), labels[:, enough]
    if len(enough) < 1 + (labels.ndim == 1):
        return f"too few classes have {FOLDS} images or more"
    vectors_ND, rows, labels, groups = vectors_ND[kept], rows[kept], labels[kept], groups[kept]
    folds = _folds(labels, groups, seed)
    probabilities = _answered(vectors_ND, labels, folds, len(enough), on_folds)
    classes = tuple(subject.data.classes[place] for place in enough)
    return LabelSearch(rows, labels, classes, probabilities, doubtful_labels(labels, probabilities, classes))


def _folds(labels: np.ndarray, groups: np.ndarray, seed: int) -> np.ndarray:
    """The fold of each image (n,): groups are whole, and each class is dealt to all folds in turn."""
    names, firsts, groups = np.unique(groups, return_index=True, return_inverse=True)
    order = np.random.default_rng(seed).permutation(len(names))
    of_first = labels[firsts] if labels.ndim == 1 else _rarest(labels)[firsts]
    by_class = order[np.argsort(of_first[order], kind="stable")]
    folds = np.empty(len(names), dtype=np.int64)
    folds[by_class] = np.arange(len(names)) % FOLDS
    return folds[groups]


def _rarest(labels_NL: np.ndarray) -> np.ndarray:
    """Of several labels an image, the one that the fewest images have; for none, one more."""
    counts = labels_NL.sum(0)
    rarity = np.where(labels_NL, -counts.astype(float), -np.inf)
    return np.where(labels_NL.any(1), rarity.argmax(1), labels_NL.shape[1])


def _answered(
    vectors_ND: Tensor,
    labels: np.ndarray,
    folds: np.ndarray,
    num_classes: int,
    on_folds: Callable[[int, int], None],
) -> np.ndarray:
    """The probabilities (n, L) that the probe of the other folds gives, in two rounds.

    In the second, probes are fitted without the images whose labels fit worst.
    """
    penalty = _penalty(vectors_ND, labels, folds, num_classes)
    probabilities_NL, kept, done = torch.zeros(len(labels), num_classes), np.ones(len(labels), dtype=bool), 0
    for _ in range(_ROUNDS):
        for fold in range(FOLDS):
            fit, held = np.flatnonzero((folds != fold) & kept), np.flatnonzero(folds == fold)
            probabilities_NL[held] = _probe(vectors_ND, labels, fit, held, num_classes, penalty)
            on_folds(done := done + 1, _ROUNDS * FOLDS)
        kept = ~_fitting_worst(probabilities_NL.numpy(), labels)
    return probabilities_NL.numpy()


def _fitting_worst(probabilities_NL: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Which images of each class have the smallest probabilities of their labels, (n,)."""
    worst = np.zeros(len(labels), dtype=bool)
    if labels.ndim == 2:
        own = np.where(labels, probabilities_NL, 1 - probabilities_NL).min(1)
        worst[np.argsort(own, kind="stable")[: int(_TRIMMED * len(own))]] = True
        return worst
    own = probabilities_NL[np.arange(len(labels)), labels]
    for rows in rows_by_class(labels):
        worst[rows[np.argsort(own[rows], kind="stable")[: int(_TRIMMED * len(rows))]]] = True
    return worst


def _penalty(vectors_ND: Tensor, labels: np.ndarray, folds: np.ndarray, num_classes: int) -> float:
    """The penalty with the least loss on one fold, of not more images than tell."""
    fit, held = np.flatnonzero(folds != 0), np.flatnonzero(folds == 0)
    fit, held = (part[:: max(2 * len(part) // _CHOSEN_ON, 1)] for part in (fit, held))
    if labels.ndim == 1:  # each class must be there to fit to
        fit = np.union1d(fit, np.flatnonzero(folds != 0)[np.unique(labels[folds != 0], return_index=True)[1]])
    truth = labels[held] if labels.ndim == 2 else np.eye(num_classes, dtype=bool)[labels[held]]

    def loss(penalty: float) -> float:
        told = (
            _probe(vectors_ND, labels, fit, held, num_classes, penalty).double().clamp(1e-9, 1 - 1e-9).numpy()
        )
        right = np.log(told[truth]).sum()
        return -float(right + (np.log(1 - told[~truth]).sum() if labels.ndim == 2 else 0))

    return min(_TRIED, key=loss)


def _probe(
    vectors_ND: Tensor,
    labels: np.ndarray,
    fit: np.ndarray,
    held: np.ndarray,
    num_classes: int,
    penalty: float,
) -> Tensor:
    """Probabilities (n, L) of the held images, by a probe that is fitted to the others."""
    if labels.ndim == 1:
        head = LinearHead.fit(vectors_ND[fit], labels[fit], num_classes, penalty)
        return head(vectors_ND[held]).softmax(1)
    columns = [_yes(vectors_ND, labels[:, place], fit, held, penalty) for place in range(num_classes)]
    return torch.stack(columns, dim=1)


def _yes(
    vectors_ND: Tensor, shown_N: np.ndarray, fit: np.ndarray, held: np.ndarray, penalty: float
) -> Tensor:
    """The probability that each held image shows one class; of a class that all or none show, their share."""
    if shown_N[fit].all() or not shown_N[fit].any():
        return torch.full((len(held),), float(shown_N[fit].mean()))
    head = LinearHead.fit(vectors_ND[fit], shown_N[fit].astype(np.int64), 2, penalty)
    return head(vectors_ND[held]).softmax(1)[:, 1]


def label_kinds(found: LabelSearch | str, model: str) -> Iterator[Kind]:
    """Tell which labels are likely wrong."""
    title = "a label that is likely wrong"
    if isinstance(found, str):
        yield Kind("label", title, "doubtful", "", missing=found)
        return
    findings = tuple(
        Finding(
            (int(found.rows[doubt.position]),),
            f"labelled {doubt.given}, more likely {doubt.suggested} (its label {doubt.self_confidence:.1%})",
            doubt.self_confidence,
        )
        for doubt in found.doubts.doubts
    )
    yield Kind("label", title, "doubtful", _means(found, model), findings)


def _means(found: LabelSearch, model: str) -> str:
    return (
        f"Probes on the features of {model}, each fitted without the images that it answers for, agree "
        f"with {found.accuracy:.1%} of the labels. By confident learning about {found.doubts.share:.1%} of "
        "them are wrong. Look at the first of them: of such lists about half were real errors in well-known "
        "test sets (arXiv:2103.14749), and a weak model names many labels that are right."
    )
