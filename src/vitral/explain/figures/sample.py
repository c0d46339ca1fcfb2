"""Which images the figures are of, and those of them that are shown."""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vitral.data.image_data import DataSource, open_data
from vitral.data.sources import find_images
from vitral.data.split import Split
from vitral.data.subsets import sample, thinned
from vitral.images.preprocess import Preprocess
from vitral.runtime.errors import ImageError, VitralError

Data = DataSource | Split | Sequence[str | os.PathLike]


def draw_sample(data: Data, count: int, seed: int, warn: Callable[[str], None]) -> tuple[str, Split]:
    """Draws images to measure, evenly over the classes where there are any; labels play no other part.

    Args:
        data: what `open_data` takes, of which the test images are taken, else those held out, else all; a
            `Split`; or files, folders and patterns of pictures.
        count: how many, at most.
        seed: of the choice.
        warn: told what was passed over.

    Returns:
        What they are of, in words, and the images.

    Raises:
        VitralError: if there are none.
    """
    if isinstance(data, Split):
        return "images", _drawn(data, count, seed)
    if isinstance(data, list | tuple):
        return "pictures", _drawn(_pictures([os.fspath(word) for word in data], warn), count, seed)
    if isinstance(data, str | os.PathLike) and os.path.isdir(data) and not _has_classes(os.fspath(data)):
        return os.fspath(data), _drawn(_pictures([os.fspath(data)], warn), count, seed)
    opened = open_data(data, val_fraction=0).told(warn)  # pyrefly: ignore[bad-argument-type]
    name = next(name for name in ("test", "val", "train") if name in opened.splits)
    return f"{opened.source}, split {name}", _drawn(opened.split(name), count, seed)


def _has_classes(folder: str) -> bool:
    try:
        open_data(folder, val_fraction=0)
    except VitralError:
        return False
    return True


def _pictures(words: list[str], warn: Callable[[str], None]) -> Split:
    found = find_images(words)
    for note in (*found.notes, *found.failures):
        warn(note)
    return Split(_Files(found.files), np.zeros(len(found.files), dtype=np.int64), found.files)


@dataclass(frozen=True)
class _Files:
    """Pictures by their paths."""

    files: Sequence[str]

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Path:
        return Path(self.files[index])


def _drawn(split: Split, count: int, seed: int) -> Split:
    return thinned(split, count) if split.multi_label else sample(split, count, seed)


@dataclass(frozen=True)
class Shown:
    """Images that are looked at one by one, as a model sees them."""

    images_BHW3: np.ndarray  # bytes
    names_B: tuple[str, ...]


def shown(split: Split, preprocess: Preprocess, count: int) -> Shown | None:
    """Takes the first readable images, evenly over the split; None if there are none."""
    order = np.unique(np.linspace(0, len(split) - 1, min(count, len(split))).astype(int))
    order = [*order.tolist(), *(row for row in range(len(split)) if row not in set(order.tolist()))]
    pixels, names = [], []
    for row in order:
        try:
            picture = preprocess.fit(preprocess.open(split.images[row]))
        except ImageError:  # named where all images are read
            continue
        pixels.append(np.asarray(picture))
        names.append(split.names[row])
        if len(pixels) == count:
            break
    return Shown(np.stack(pixels), tuple(names)) if pixels else None
