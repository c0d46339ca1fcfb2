"""What is chosen on labelled images that are held out from the fit."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from vitral.evaluation.calibration import calibrate
from vitral.inference.features import PooledFeatures
from vitral.model.config import Pooling
from vitral.runtime.errors import VitralError

_FOLDS = 5
_ENOUGH_HELD_OUT = 500  # images; with as many in one fold, the other folds say nothing new


class Labelled:
    """The images that may be fitted to, and which of them to hold out while choosing."""

    def __init__(self, parts: Sequence[PooledFeatures], classes: Sequence[str], seed: int) -> None:
        self.parts, self.num_classes = parts, len(classes)
        self.labels = np.concatenate([part.labels for part in parts])
        counts = np.bincount(parts[0].labels, minlength=len(classes))
        if not counts.all():
            raise VitralError(f"no labelled image of {classes[int(counts.argmin())]!r} is left; allow more")
        self.folds = self._folds(int(counts.min()), seed)

    def vectors(self, layer: int, kind: Pooling) -> Tensor:
        return torch.cat([part.of(layer, kind) for part in self.parts])

    def of(self, choice: "Choice") -> Tensor:
        return self.vectors(choice.layer, choice.features)

    def _folds(self, fewest: int, seed: int) -> list[tuple[np.ndarray, np.ndarray]]:
        """Rows to fit to and rows held out: the validation split if there is one, else fifths by class."""
        from sklearn.model_selection import StratifiedKFold

        rows = np.arange(len(self.labels))
        if len(self.parts) > 1:
            first = len(self.parts[0].labels)
            return [(rows[:first], rows[first:])]
        if fewest < 2:
            return []
        splitter = StratifiedKFold(min(_FOLDS, fewest), shuffle=True, random_state=seed)
        folds = list(splitter.split(rows, self.labels))
        return folds[:1] if len(folds[0][1]) >= _ENOUGH_HELD_OUT else folds


@dataclass(frozen=True)
class Choice:
    """What did best on the held-out images, and what it said of them; without such images, a default."""

    features: Pooling
    layer: int
    setting: float
    answers_NL: Tensor | None = None
    labels_N: Tensor | None = None

    @property
    def held_out_top1(self) -> float | None:
        if self.answers_NL is None or self.labels_N is None:
            return None
        return float((self.answers_NL.argmax(1) == self.labels_N).double().mean())

    @property
    def held_out_loss(self) -> float | None:
        if self.answers_NL is None or self.labels_N is None:
            return None
        return float(F.cross_entropy(self.answers_NL, self.labels_N))


@dataclass(frozen=True)
class Method:
    """A way to answer, and how it is set."""

    settings: Sequence[float]
    default: float  # where one image per class leaves none to choose by
    # Vectors (N, D), labels (N,), queries (Q, D), number of classes, settings -> logits (Q, L) of each.
    answers: Callable[[Tensor, np.ndarray, Tensor, int, Sequence[float]], list[Tensor]]
    merit: Callable[[Choice], Any]  # of what is held out; the largest wins


def choose(labelled: Labelled, kind: Pooling, layers: Sequence[int], method: Method) -> Choice:
    if not labelled.folds:
        return Choice(kind, layers[0], method.default)
    held_out = np.concatenate([rows for _, rows in labelled.folds])
    labels_N = torch.from_numpy(labelled.labels[held_out])
    choices = []
    for layer in layers:
        vectors = labelled.vectors(layer, kind)
        of_folds = [
            method.answers(
                vectors[fit], labelled.labels[fit], vectors[held], labelled.num_classes, method.settings
            )
            for fit, held in labelled.folds
        ]
        for setting, parts in zip(method.settings, zip(*of_folds, strict=True), strict=True):
            choices.append(Choice(kind, layer, setting, torch.cat(parts), labels_N))
    return max(choices, key=method.merit)


def temperature_of(choice: Choice) -> float:
    if choice.answers_NL is None or choice.labels_N is None:
        return 1.0
    calibration = calibrate(choice.answers_NL, choice.labels_N)
    return calibration.temperature if calibration else 1.0
