"""`Prediction`: what is said of one image, whatever computed it."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np

from vitral.images import notebook
from vitral.images.picture import ImageSource, open_image
from vitral.images.reading import batches_ahead
from vitral.runtime.errors import ImageError, VitralError

Read = TypeVar("Read")


@dataclass(frozen=True)
class Prediction:
    """The likeliest labels of one image, or why there are none.

    Of a multi-label model, each probability is of that label alone, and they need not add up to 1.
    """

    image: str  # the path, or "image 3" for what has no name
    top: tuple[tuple[str, float], ...]  # (label, probability), likeliest first
    error: str | None = None
    abstained: bool = False  # the likeliest is less sure than the model was told to be

    @property
    def label(self) -> str:
        """The likeliest label. Raises VitralError if the image could not be read."""
        if self.error is not None:
            raise VitralError(f"{self.image} has no label: {self.error}")
        return self.top[0][0]

    def _repr_html_(self) -> str:
        """Show the picture with its answers in a notebook."""
        if self.error is not None:
            return notebook.table([(self.image, self.error)])
        try:
            picture = notebook.picture(open_image(Path(self.image)))
        except ImageError:  # it was given as pixels, or is gone
            picture = notebook.table([(self.image,)])
        return f'<div style="display: flex; gap: 1em">{picture}{notebook.bars(self.top)}</div>'


def predicted(
    images: Iterable[ImageSource],
    read: Callable[[ImageSource], Read],
    batch_size: int,
    probabilities: Callable[[list[Read]], np.ndarray],
    said: Callable[[str, np.ndarray], Prediction],
) -> Iterator[Prediction]:
    """What is said of each image, in order, while later ones are read; of an unreadable one its error.

    Args:
        images: of any kind.
        read: makes of one what is computed with.
        batch_size: images at a time.
        probabilities: (B, L) of the images of a batch that could be read.
        said: the prediction of a name and its probabilities (L,).
    """
    for names, loaded in batches_ahead(images, read, batch_size):
        readable = [item for item in loaded if not isinstance(item, ImageError)]
        rows = iter(probabilities(readable) if readable else ())
        for name, item in zip(names, loaded, strict=True):
            if isinstance(item, ImageError):
                yield Prediction(name, (), str(item))
            else:
                yield said(name, next(rows))


def likeliest(probabilities_L: np.ndarray, labels: Sequence[str], top: int) -> tuple[tuple[str, float], ...]:
    """The `top` likeliest labels with their probabilities; of equal ones the first."""
    order = np.argsort(-probabilities_L, kind="stable")[:top]
    return tuple((labels[index], float(probabilities_L[index])) for index in order)
