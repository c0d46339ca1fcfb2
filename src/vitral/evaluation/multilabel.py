"""How well a model does where an image shows any number of classes, each a yes-or-no question of its own.

`MultiLabelOutcomes` of single images merge; `MultiLabelEvaluation` is drawn from them.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Self

import numpy as np
import torch
from torch import Tensor

from vitral.evaluation.mistakes import Mistakes
from vitral.runtime.errors import VitralError

THRESHOLD = 0.5  # a class counts as predicted where its probability is above it
_LEAST_LOG = -100.0  # as torch's binary_cross_entropy bounds the logarithm of what float32 rounds to 0


def distinct(classes: Iterable[str]) -> list[str]:
    """The names for a result by name; of two cranes, as ImageNet has, the second says its number."""
    found: dict[str, None] = {}
    for place, name in enumerate(classes):
        found[name if name not in found else f"{name} (class {place})"] = None
    return list(found)


@dataclass(frozen=True)
class MultiLabelOutcomes:
    """What became of each image, as arrays."""

    labels: np.ndarray  # (n, L), which classes the image shows
    log_probabilities: np.ndarray  # (n, L), that it shows them
    losses: np.ndarray  # (n,), binary cross-entropy, the mean over the classes, nats

    @classmethod
    def of(cls, log_probabilities_BL: Tensor, labels_BL: Tensor) -> Self:
        """Of ``logits.logsigmoid()``, or of `Classifier.log_probabilities`, and labels of 0 and 1."""
        yes_BL = log_probabilities_BL.float()
        no_BL = torch.log(-torch.expm1(yes_BL))
        right_BL = torch.where(labels_BL > 0, yes_BL, no_BL).clamp(min=_LEAST_LOG)
        columns = (labels_BL > 0, yes_BL, -right_BL.mean(1))
        return cls(*(column.cpu().numpy() for column in columns))

    @classmethod
    def merge(cls, parts: Iterable["MultiLabelOutcomes"]) -> Self:
        rows = [vars(part) for part in parts]
        return cls(**{name: np.concatenate([row[name] for row in rows]) for name in rows[0]})


@dataclass(frozen=True)
class MultiLabelClassResult:
    n: int  # images that show the class
    average_precision: float | None  # None where no image shows it


@dataclass(frozen=True)
class MultiLabelEvaluation:
    """Shares are 0..1. Means over classes are of those that an image shows."""

    score_name: ClassVar[str] = "mAP"

    n: int
    mean_average_precision: float  # scikit-learn's, with no interpolation
    micro_f1: float  # of all images' classes together, at a threshold of 0.5
    macro_f1: float  # the mean over the classes
    exact_match: float  # share of the images whose classes are all right and complete
    loss: float  # mean binary cross-entropy over images and classes, nats
    per_class: dict[str, MultiLabelClassResult]
    mistakes: Mistakes | None = field(default=None, repr=False, compare=False)  # if they were asked for

    @classmethod
    def of(cls, outcomes: MultiLabelOutcomes, classes: Iterable[str]) -> Self:
        """Raises VitralError if not one image shows a class."""
        from sklearn.metrics import average_precision_score, f1_score

        labels = outcomes.labels
        counts = np.sum(labels, axis=0)
        shown = np.asarray(counts > 0)
        if not shown.any():
            raise VitralError(f"none of the {len(labels):,} images shows a class, so precision means nothing")
        predicted = outcomes.log_probabilities > np.log(THRESHOLD)
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
            exact_match=float((labels == predicted).all(1).mean()),
            loss=float(outcomes.losses.mean()),
            per_class={
                name: MultiLabelClassResult(int(count), precision)
                for name, count, precision in zip(distinct(classes), counts, precisions, strict=True)
            },
        )

    @property
    def merit(self) -> float:
        """What the best epoch is chosen by: ranking is learned before probabilities, so both count."""
        return (self.mean_average_precision + self.micro_f1) / 2

    @property
    def score(self) -> float:
        """The one number that people are told of an epoch."""
        return self.mean_average_precision

    @property
    def metrics(self) -> dict[str, float]:
        """What a run records of each epoch, beside the loss."""
        return {
            "mean_average_precision": self.mean_average_precision,
            "micro_f1": self.micro_f1,
            "exact_match": self.exact_match,
        }

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        values = {part.name: getattr(self, part.name) for part in fields(self)}
        del values["mistakes"]
        return {**values, "per_class": {name: vars(result) for name, result in self.per_class.items()}}
