"""`Split`: labelled images of one purpose; `Found`: what a source holds."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from PIL import Image

SPLITS = ("train", "val", "test")
_NAMES_IN_MESSAGE = 5


class Images(Protocol):
    """Encoded (a path or a file's bytes) or opened images, by index."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> Path | bytes | Image.Image: ...


@dataclass(frozen=True)
class Split:
    """Labelled images: encoded (a path or bytes) or opened, and the name by which messages know each."""

    images: Images
    # (n,) indices into the classes; or, with any number of classes an image, (n, L) of which it shows.
    labels: np.ndarray
    names: Sequence[str]

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def multi_label(self) -> bool:
        return self.labels.ndim == 2

    def take(self, indices: np.ndarray) -> "Split":
        return Split(
            _Taken(self.images, indices),
            self.labels[indices],
            [self.names[index] for index in indices],
        )


@dataclass(frozen=True)
class _Taken:
    """A view of some of the images, copying none."""

    images: Images
    indices: np.ndarray

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Path | bytes | Image.Image:
        return self.images[int(self.indices[index])]


@dataclass(frozen=True)
class Found:
    """The classes and splits of a source, and what its reader passed over, a line each."""

    classes: tuple[str, ...]
    splits: dict[str, Split]
    notes: tuple[str, ...] = ()


def shortened(names: Sequence[str]) -> str:
    """A list for a message, of which the first few are named."""
    shown = ", ".join(names[:_NAMES_IN_MESSAGE])
    more = len(names) - _NAMES_IN_MESSAGE
    return f"{shown} and {more:,} more" if more > 0 else shown
