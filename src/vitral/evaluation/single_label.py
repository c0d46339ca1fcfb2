"""How well a model does where an image shows one class."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self

import numpy as np
from torch import Tensor
from torch.nn import functional as F

from vitral.evaluation.evaluation import Evaluation, distinct
from vitral.evaluation.intervals import wilson
from vitral.evaluation.outcomes import Outcomes
from vitral.images import notebook

CALIBRATION_BINS = 15
# JSON has the confusion matrix of so many classes at most; of 20,000 it would be a gigabyte of zeros.
MOST_CLASSES_IN_JSON = 1000
_CLASSES_IN_HEAT_MAP = 30


@dataclass(frozen=True)
class SingleLabelOutcomes(Outcomes):
    """What became of each image, as arrays (n,)."""

    predictions: np.ndarray
    in_top5: np.ndarray
    confidences: np.ndarray  # probability of the prediction
    losses: np.ndarray  # cross-entropy, nats

    @classmethod
    def of(cls, log_probabilities_BL: Tensor, labels: Tensor) -> Self:
        """Keep what an evaluation needs of a batch; logits do as well as logarithms of probabilities."""
        logits_BL = log_probabilities_BL.float()
        top_B5 = logits_BL.topk(min(5, logits_BL.shape[1])).indices
        columns = (
            labels,
            top_B5[:, 0],
            (top_B5 == labels[:, None]).any(1),
            logits_BL.softmax(1).amax(1),
            F.cross_entropy(logits_BL, labels, reduction="none"),
        )
        return cls(*(column.cpu().numpy() for column in columns))

    @property
    def answers(self) -> np.ndarray:
        return self.predictions

    @property
    def wrong(self) -> np.ndarray:
        return self.labels != self.predictions

    @property
    def confidences_in_error(self) -> np.ndarray:
        return self.confidences


@dataclass(frozen=True)
class ClassResult:
    n: int
    accuracy: float  # share of the class's images that were recognised (recall)
    precision: float  # share of the predictions of this class that were right


@dataclass(frozen=True, kw_only=True, repr=False)
class SingleLabelEvaluation(Evaluation):
    """Accuracy and calibration of a model of one class per image."""

    score_name: ClassVar[str] = "top1"
    score_words: ClassVar[str] = "accuracy"

    top1: float
    top5: float
    ece: float  # expected calibration error over 15 equal bins (arXiv:1706.04599, eq. 3)
    ci95: tuple[float, float]  # of top1, Wilson's score interval
    per_class: dict[str, ClassResult]
    # Images by true class (rows) and prediction (columns), a scipy.sparse.csr_array (L, L): a full matrix
    # grows with the square of the classes.
    counts: Any = field(compare=False)

    @classmethod
    def of(cls, outcomes: SingleLabelOutcomes, classes: Iterable[str]) -> Self:
        from scipy.sparse import csr_array

        names, n = distinct(classes), len(outcomes.labels)
        correct = ~outcomes.wrong
        places, shape = (outcomes.labels, outcomes.predictions), (len(names), len(names))
        return cls(
            n=n,
            top1=float(correct.mean()),
            top5=float(outcomes.in_top5.mean()),
            loss=float(outcomes.losses.mean()),
            ece=calibration_error(outcomes.confidences, correct),
            ci95=wilson(int(correct.sum()), n),
            per_class=_per_class(names, outcomes),
            counts=csr_array((np.ones(n, dtype=np.int64), places), shape=shape),
        )

    @property
    def confusion(self) -> list[list[int]]:
        """Images by true class (rows) and prediction (columns), (L, L); made anew each time."""
        return self.counts.toarray().tolist()

    def taken_most_often_for(self) -> dict[int, tuple[int, int]]:
        """Of each class with mistakes, which other it was taken for most often and how many images were."""
        from scipy.sparse import diags_array

        mistaken = (self.counts - diags_array(self.counts.diagonal(), dtype=np.int64)).tocsr()
        most, others = mistaken.max(axis=1).toarray(), mistaken.argmax(axis=1)
        return {int(truth): (int(others[truth]), int(most[truth])) for truth in np.flatnonzero(most)}

    @property
    def merit(self) -> float:
        return self.top1

    @property
    def metrics(self) -> dict[str, float]:
        return {"top1": self.top1, "ece": self.ece}

    @property
    def chance(self) -> float:
        return max(result.n for result in self.per_class.values()) / self.n

    def to_dict(self) -> dict[str, Any]:
        """Return the figures for JSON; the confusion of more than `MOST_CLASSES_IN_JSON` classes is None."""
        values = super().to_dict()
        del values["counts"]
        few = len(self.per_class) <= MOST_CLASSES_IN_JSON
        return {**values, "confusion": self.confusion if few else None}

    def figures(self) -> list[tuple[str, str]]:
        low, high = self.ci95
        rows = [
            ("accuracy", f"{self.top1:.2%} (95 % interval {low:.2%} to {high:.2%})"),
            ("top-5 accuracy", f"{self.top5:.2%}"),
            ("loss", f"{self.loss:.4f}"),
            ("calibration error", f"{self.ece:.2%}"),
        ]
        return rows if len(self.per_class) > 5 else [rows[0], *rows[2:]]

    def class_rows(self, most: int) -> list[dict[str, str]]:
        names, taken_for = list(self.per_class), self.taken_most_often_for()
        rows = []
        for place in sorted(range(len(names)), key=lambda i: self.per_class[names[i]].accuracy)[:most]:
            result = self.per_class[names[place]]
            other, count = taken_for.get(place, (place, 0))
            rows.append(
                {
                    "class": names[place],
                    "images": f"{result.n:,}",
                    "accuracy": f"{result.accuracy:.1%}",
                    "precision": f"{result.precision:.1%}",
                    "most often mistaken for": f"{names[other]} ({count:,})" if count else "",
                }
            )
        return rows

    def _repr_html_(self) -> str:
        if len(self.per_class) > _CLASSES_IN_HEAT_MAP:
            return super()._repr_html_()
        title = "images by true class (rows) and prediction (columns)"
        return super()._repr_html_() + notebook.heat_map(self.confusion, list(self.per_class), title)


def _per_class(names: list[str], outcomes: SingleLabelOutcomes) -> dict[str, ClassResult]:
    from sklearn.metrics import precision_recall_fscore_support

    figures: Any = precision_recall_fscore_support(
        outcomes.labels, outcomes.predictions, labels=np.arange(len(names)), zero_division=0
    )
    precisions, recalls, _, counts = figures
    return {
        name: ClassResult(int(n), float(recall), float(precision))
        for name, n, recall, precision in zip(names, counts, recalls, precisions, strict=True)
    }


@dataclass(frozen=True)
class CalibrationBins:
    """Sums over the images whose confidence is in bin b, (b / 15, (b + 1) / 15], as arrays (15,)."""

    counts: np.ndarray  # images
    confidences: np.ndarray
    correct: np.ndarray  # right answers

    @classmethod
    def of(cls, confidences: np.ndarray, correct: np.ndarray) -> Self:
        """Sort confidences and whether each answer is right, both (n,), into equal bins."""
        # scikit-learn's calibration_curve does not say how many images a bin has.
        bins = np.clip(np.ceil(confidences * CALIBRATION_BINS).astype(int) - 1, 0, None)
        sums = (
            np.bincount(bins, weights, CALIBRATION_BINS)
            for weights in (None, confidences, correct.astype(float))
        )
        return cls(*sums)

    @property
    def error(self) -> float:
        """The expected calibration error: the mean distance of confidence from accuracy, by images."""
        return float(np.abs(self.confidences - self.correct).sum() / self.counts.sum())


def calibration_error(confidences: np.ndarray, correct: np.ndarray) -> float:
    """Compute the mean distance of confidence from accuracy over equal bins, weighted by their images."""
    return CalibrationBins.of(confidences, correct).error
