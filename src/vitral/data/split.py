"""`Split`: labelled images of one purpose, whatever source they are of; `Found`: what a source holds."""

import hashlib
import os
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Protocol

import numpy as np
from PIL import Image

from vitral.data.blocks import Blocks
from vitral.data.names import Names
from vitral.images.files import opened
from vitral.runtime.errors import VitralError

SPLITS = ("train", "val", "test")
_NAMES_IN_MESSAGE = 5
_SIZES = 200  # images whose sizes tell what is typical


class Images(Protocol):
    """Pictures by index: encoded (a path or a file's bytes), or decoded."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> Path | bytes | Image.Image: ...


@dataclass(frozen=True)
class Split:
    """Labelled images, and the name by which messages know each."""

    images: Images
    # (n,) indices into the classes; or, with any number of classes per image, (n, L) of which it shows.
    labels: np.ndarray
    names: Sequence[str]
    # (n,) numbers of what must not stand in two splits, such as a patient; None: each image is its own.
    groups: np.ndarray | None = None
    blocks: Blocks | None = None  # which images are cheap to read together; None: each by itself

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def multi_label(self) -> bool:
        return self.labels.ndim == 2

    @cached_property
    def typical_sizes(self) -> np.ndarray:
        """(height, width) of at most 200 images, (n, 2); read once.

        Raises:
            VitralError: if not one of them can be read.
        """
        return image_sizes(self, _SIZES)

    @cached_property
    def fingerprint(self) -> str:
        """Digests which images they are, in any order; takes a second for a million."""
        return names_digest(self.names)

    def take(self, indices: np.ndarray) -> "Split":
        """Gives the images of these rows, in this order; copies none."""
        return Split(
            _Taken(self.images, indices),
            self.labels[indices],
            taken_names(self.names, indices),
            None if self.groups is None else self.groups[indices],
            None if self.blocks is None else self.blocks.take(indices),
        )


@dataclass(frozen=True)
class _Taken:
    """A view of some of the images."""

    images: Images
    indices: np.ndarray

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Path | bytes | Image.Image:
        return self.images[int(self.indices[index])]


@dataclass(frozen=True)
class JoinedImages:
    """A view of several collections of images, one after the other; none is read before it is asked for."""

    parts: Sequence[Images]
    ends: list[int]

    @classmethod
    def of(cls, parts: Sequence[Images]) -> "JoinedImages":
        return cls(parts, np.cumsum([len(part) for part in parts]).tolist())

    def __len__(self) -> int:
        return self.ends[-1]

    def __getitem__(self, index: int) -> Path | bytes | Image.Image:
        index = range(len(self))[int(index)]
        part = bisect_right(self.ends, index)
        return self.parts[part][index - (self.ends[part - 1] if part else 0)]


def joined(splits: Sequence[Split]) -> Split:
    """Gives the images of several splits, one split after the other, with groups if all have some."""
    groups = [split.groups for split in splits if split.groups is not None]
    return Split(
        JoinedImages.of([split.images for split in splits]),
        np.concatenate([split.labels for split in splits]),
        Names.of(name for split in splits for name in split.names),
        np.concatenate(groups) if len(groups) == len(splits) else None,
    )


@dataclass(frozen=True)
class Found:
    """The classes and splits of a source, and what its reader passed over, a line each."""

    classes: tuple[str, ...]
    splits: dict[str, Split]
    notes: tuple[str, ...] = ()


def taken_names(names: Sequence[str], rows: np.ndarray) -> Names:
    """Gives the names of some rows, in this order."""
    return names.take(rows) if isinstance(names, Names) else Names.of(names[int(row)] for row in rows)


def shortened(names: Sequence[str]) -> str:
    """Gives a list for a message, of which the first few are named."""
    shown = ", ".join(names[:_NAMES_IN_MESSAGE])
    more = len(names) - _NAMES_IN_MESSAGE
    return f"{shown} and {more:,} more" if more > 0 else shown


def class_counts(labels: np.ndarray, num_classes: int) -> np.ndarray:
    """Counts the images that show each class, (L,)."""
    return np.bincount(labels, minlength=num_classes) if labels.ndim == 1 else labels.sum(0)


def names_digest(names: Iterable[str]) -> str:
    """Digests names in any order."""
    return hashlib.sha256(os.fsencode("\n".join(sorted(names)))).hexdigest()


def evenly(count: int, at_most: int) -> np.ndarray:
    """Gives at most so many of `count` rows, evenly over their order."""
    return np.linspace(0, count - 1, min(at_most, count), dtype=int)


def image_sizes(split: Split, at_most: int) -> np.ndarray:
    """Reads (height, width) of evenly chosen images, (n, 2), from their headers; passes over unreadable ones.

    Raises:
        VitralError: if not one of them can be read.
    """
    sizes = []
    for row in evenly(len(split), at_most):
        try:
            image = split.images[row]
            with nullcontext(image) if isinstance(image, Image.Image) else opened(image) as picture:
                sizes.append((picture.height, picture.width))
        except Exception:  # Pillow raises many kinds on damaged bytes; loading the image says which
            continue
    if not sizes:
        raise VitralError(f"none of the images could be read, for example {split.names[0]}")
    return np.array(sizes)
