"""How well a model does where an image shows any number of classes, each a yes-or-no question of its own."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar, Self

import numpy as np
import torch
from torch import Tensor

from vitral.evaluation.evaluation import Evaluation, distinct
from vitral.evaluation.outcomes import Outcomes
from vitral.runtime.errors import VitralError

THRESHOLD = 0.5  # a class counts as predicted where its probability is above it
_LEAST_LOG = -100.0  # as torch's binary_cross_entropy bounds the logarithm of what float32 rounds to 0


@dataclass(frozen=True)
class MultiLabelOutcomes(Outcomes):
    """What became of each image, as arrays; labels (n, L) say which classes it shows."""

    log_probabilities: np.ndarray  # (n, L), that it shows them
    losses: np.ndarray  # (n,), binary cross-entropy, the mean over the classes, nats

    @classmethod
    def of(cls, log_probabilities_BL: Tensor, labels: Tensor) -> Self:
        """Of ``logits.logsigmoid()``, or of `Classifier.log_probabilities`, and labels of 0 and 1."""
        yes_BL = log_probabilities_BL.float()
        no_BL = torch.log(-torch.expm1(yes_BL))
        right_BL = torch.where(labels > 0, yes_BL, no_BL).clamp(min=_LEAST_LOG)
        columns = (labels > 0, yes_BL, -right_BL.mean(1))
        return cls(*(column.cpu().numpy() for column in columns))

    @property
    def answers(self) -> np.ndarray:
        return self.log_probabilities > np.log(THRESHOLD)

    @property
    def wrong(self) -> np.ndarray:
        return (self.answers != self.labels).any(1)

    @property
    def confidences_in_error(self) -> np.ndarray:
        probabilities = np.exp(self.log_probabilities)
        of_answers = np.where(self.answers, probabilities, 1 - probabilities)
        return np.where(self.answers != self.labels, of_answers, 0).max(1)


@dataclass(frozen=True)
class MultiLabelClassResult:
    n: int  # images that show the class
    average_precision: float | None  # None where no image shows it


@dataclass(frozen=True, kw_only=True, repr=False)
class MultiLabelEvaluation(Evaluation):
    """Precision and F1 of a model of any number of classes per image.

    Means over classes are of those that an image shows.
    """

    score_name: ClassVar[str] = "mean_average_precision"
    score_words: ClassVar[str] = "mAP"

    mean_average_precision: float  # scikit-learn's, with no interpolation
    micro_f1: float  # of all images' classes together, at a threshold of 0.5
    macro_f1: float  # the mean over the classes
    exact_match: float  # share of the images whose classes are all right and complete
    per_class: dict[str, MultiLabelClassResult]

    @classmethod
    def of(cls, outcomes: MultiLabelOutcomes, classes: Iterable[str]) -> Self:
        """Raises VitralError if not one image shows a class."""
        from sklearn.metrics import average_precision_score, f1_score

        labels = outcomes.labels
        counts = np.sum(labels, axis=0)
        shown = np.asarray(counts > 0)
        if not shown.any():
            raise VitralError(f"none of the {len(labels):,} images shows a class, so precision means nothing")
        predicted = outcomes.answers
        # The order of logarithms is that of probabilities, and float32 keeps more of them apart.
        precisions = [
            float(average_precision_score(true, score)) if any_shown else None
            for true, score, any_shown in zip(labels.T, outcomes.log_probabilities.T, shown, strict=True)
        ]
        return cls(
            n=len(labels),
            mean_average_precision=float(np.mean([value for value in precisions if value is not None])),
            micro_f1=float(f1_score(labels, predicted, average="micro", zero_division=0)),
            macro_f1=float(f1_score(labels[:, shown], predicted[:, shown], average="macro", zero_division=0)),
            exact_match=float(1 - outcomes.wrong.mean()),
            loss=float(outcomes.losses.mean()),
            per_class={
                name: MultiLabelClassResult(int(count), precision)
                for name, count, precision in zip(distinct(classes), counts, precisions, strict=True)
            },
        )

    @property
    def brief(self) -> str:
        return f"mAP {self.score:.1%}"

    @property
    def merit(self) -> float:
        # Ranking is learned before probabilities, so both count.
        return (self.mean_average_precision + self.micro_f1) / 2

    @property
    def metrics(self) -> dict[str, float]:
        return {
            "mean_average_precision": self.mean_average_precision,
            "micro_f1": self.micro_f1,
            "exact_match": self.exact_match,
        }

    def figures(self) -> list[tuple[str, str]]:
        return [
            ("mean average precision", f"{self.mean_average_precision:.2%}"),
            ("F1 at 0.5", f"{self.micro_f1:.2%} (mean over classes {self.macro_f1:.2%})"),
            ("exact match at 0.5", f"{self.exact_match:.2%}"),
            ("loss", f"{self.loss:.4f}"),
        ]

    def class_rows(self, most: int) -> list[dict[str, str]]:
        rows = [(name, row.n, row.average_precision) for name, row in self.per_class.items()]
        rows.sort(key=lambda row: math.inf if row[2] is None else row[2])
        return [
            {
                "class": name,
                "images": f"{n:,}",
                "average precision": "-" if precision is None else f"{precision:.1%}",
            }
            for name, n, precision in rows[:most]
        ]
