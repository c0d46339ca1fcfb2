"""`Outcomes` of single images, which merge; each task has its own."""

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Self

import numpy as np
from torch import Tensor


@dataclass(frozen=True)
class Outcomes(ABC):
    """What became of each image, as arrays of n rows; small enough to keep for any test set."""

    labels: np.ndarray  # (n,) indices into the classes, or (n, L) of which classes an image shows

    @classmethod
    @abstractmethod
    def of(cls, log_probabilities_BL: Tensor, labels: Tensor) -> Self:
        """Keep what an evaluation needs of a batch; labels are (B,) or (B, L)."""

    @classmethod
    def merge(cls, parts: Iterable[Self]) -> Self:
        """Join the outcomes of several batches, in order."""
        rows = [vars(part) for part in parts]
        return cls(**{name: np.concatenate([row[name] for row in rows]) for name in rows[0]})

    @property
    @abstractmethod
    def answers(self) -> np.ndarray:
        """What the model says of each image, in the form of `labels`."""

    @property
    @abstractmethod
    def wrong(self) -> np.ndarray:
        """Whether each answer is wrong, (n,)."""

    @property
    @abstractmethod
    def confidences_in_error(self) -> np.ndarray:
        """The probability of each wrong answer (n,); of several labels, that of the surest wrong one."""
