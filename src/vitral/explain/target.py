"""Which score of a model is explained: a logit, or the difference of two."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vitral.runtime.errors import VitralError
from vitral.runtime.spelling import meant

# A label or its index; "predicted", the likeliest of each image.
Target = str | int

_SHOWN = 5  # labels in an error


@dataclass(frozen=True)
class Question:
    """What is asked of a batch of images: why this class, or why this one and not that one."""

    target_B: Tensor  # classes
    against_B: Tensor | None = None  # "why A and not B": the score is the difference of the logits

    def scores(self, logits_BL: Tensor) -> Tensor:
        """Computes the explained score of each image from logits, without temperature: (B,), float32."""
        scores_B = logits_BL.float().gather(1, self.target_B[:, None])[:, 0]
        if self.against_B is None:
            return scores_B
        return scores_B - logits_BL.float().gather(1, self.against_B[:, None])[:, 0]

    def take(self, rows_B: Tensor) -> "Question":
        """The same of some of the images."""
        against_B = None if self.against_B is None else self.against_B[rows_B]
        return Question(self.target_B[rows_B], against_B)


def ask(
    logits_BL: Tensor, labels: Sequence[str], target: Target = "predicted", against: Target | None = None
) -> Question:
    """Decides what is explained of images with these logits.

    Args:
        logits_BL: of the images.
        labels: of the model; may be empty.
        target: a label, its index, or "predicted".
        against: a label or index to set it against; "predicted" is the likeliest other class.

    Raises:
        VitralError: if the model has no such class, or both are the same one.
    """
    if logits_BL.shape[1] == 0:
        raise VitralError("this model has no classes to explain; a method that knows of none can serve it")
    target_B = _classes(logits_BL, labels, target)
    if against is None:
        return Question(target_B)
    others_BL = logits_BL.scatter(1, target_B[:, None], -torch.inf)
    against_B = _classes(others_BL, labels, against)
    if logits_BL.shape[1] < 2 or (against_B == target_B).any():
        raise VitralError(f"{against} is explained against itself; name another class")
    return Question(target_B, against_B)


def _classes(logits_BL: Tensor, labels: Sequence[str], target: Target) -> Tensor:
    if target == "predicted":
        return logits_BL.argmax(1)
    return torch.full_like(logits_BL[:, 0], class_index(target, labels, logits_BL.shape[1]), dtype=torch.long)


def class_index(target: Target, labels: Sequence[str], num_classes: int) -> int:
    """Finds a class by its label or index. Raises VitralError if there is none."""
    if isinstance(target, str) and target in labels:
        return list(labels).index(target)
    if isinstance(target, int) and not 0 <= target < num_classes:
        raise VitralError(f"there is no class {target}; this model has 0 to {num_classes - 1}")
    if isinstance(target, int):
        return target
    some = f"it has {', '.join(labels[:_SHOWN])}{', ...' if len(labels) > _SHOWN else ''}"
    if not labels:
        some = f"it has no labels, only numbers from 0 to {num_classes - 1}"
    raise VitralError(f"this model has no class {target!r}; {some}{meant(target, labels)}")
