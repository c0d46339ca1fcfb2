"""What every engine is: from the pixels of images to logits and probabilities, whatever computes them."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np

from vitral.runtime.errors import VitralError


class Answers(NamedTuple):
    """What a model says of a batch of images."""

    logits: np.ndarray  # (B, L) float32
    probabilities: np.ndarray  # (B, L) float32, at the model's temperature


class Engine(Protocol):
    """Runs one model. One thread calls it at a time."""

    name: str  # such as "onnxruntime 1.32.0, float32"
    batch_sizes: tuple[int, ...]  # that it computes, the smallest first; empty: any

    def __call__(self, pixels_BHWC: np.ndarray) -> Answers:
        """Answers for any number of images, uint8 RGB of the model's size.

        Raises:
            VitralError: if an answer is not a finite number.
        """
        ...


def in_sizes(
    pixels_BHWC: np.ndarray, sizes: tuple[int, ...], run: Callable[[np.ndarray], Answers]
) -> Answers:
    """Answers for any number of images by a model that computes batches of some sizes alone.

    Args:
        pixels_BHWC: at least one image.
        sizes: of batches, the smallest first.
        run: answers for a batch of one of these sizes.
    """
    parts, done, count = [], 0, len(pixels_BHWC)
    while done < count:
        left = count - done
        # The largest that is filled; what is left over takes the smallest that holds it.
        size = next((s for s in sizes if s >= left), sizes[-1])
        batch = pixels_BHWC[done : done + size]
        if len(batch) < size:
            padding = np.zeros((size - len(batch), *batch.shape[1:]), batch.dtype)
            batch = np.concatenate([batch, padding])
        taken = min(size, left)
        parts.append(Answers(*(answer[:taken] for answer in run(batch))))
        done += taken
    return Answers(*(np.concatenate(answers) for answers in zip(*parts, strict=True)))


def unusable(path: Path, error: Exception) -> VitralError:
    """Says that an engine cannot use a file; its exceptions have no common class, and go on for pages."""
    return VitralError(f"{path} cannot be used: {' '.join(str(error).split())[:300]}")


def refuse_overflow(answers: Answers) -> Answers:
    """Gives answers back. Raises VitralError if one is no finite number, which would be taken for one."""
    if not np.isfinite(answers.logits).all():
        raise VitralError(
            "the model's outputs are not finite numbers: its weights are damaged, or its training diverged"
        )
    return answers
