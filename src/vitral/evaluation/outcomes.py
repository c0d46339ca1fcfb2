"""`Outcomes` of single images, which merge; each task has its own."""

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from torch import Tensor

from vitral.runtime.errors import VitralError

# What one of several processes found: the rows of its images, and their outcomes batch by batch.
Share = tuple[np.ndarray, list[Any]]


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

    @classmethod
    def of_shares(cls, shares: list[Share]) -> Self:
        """Join what several processes found, each image once, in the order of the rows.

        Raises:
            VitralError: if not one image could be read.
        """
        parts = [part for _, of_share in shares for part in of_share]
        if not parts:
            raise nothing_read()
        merged = cls.merge(parts)
        if len(shares) == 1:
            return merged
        rows = np.concatenate([rows for rows, _ in shares])
        order = np.argsort(rows, kind="stable")
        assert (np.diff(rows[order]) > 0).all(), "an image was judged twice"
        return cls(**{name: column[order] for name, column in vars(merged).items()})

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


def nothing_read() -> VitralError:
    return VitralError("none of the images could be read, so there is nothing to evaluate")
