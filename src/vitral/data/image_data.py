"""`ImageData`: every split of a source over one list of classes; `open_data` finds and divides it."""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from vitral.data.columns import FOUND, Columns
from vitral.data.sources import find
from vitral.data.sources.dataset import read_datasets
from vitral.data.sources.doubles import note_on_doubles
from vitral.data.split import SPLITS, Found, Split, class_counts, shortened
from vitral.data.subsets import hold_out
from vitral.runtime import limits
from vitral.runtime.errors import VitralError

# A validation set larger than this tells no more about the best epoch, and costs time and images.
_MAX_VAL_BESIDE_TEST = 2500


@dataclass(frozen=True)
class ImageData:
    """Every split of a data source over one list of classes."""

    source: str
    classes: tuple[str, ...]
    splits: dict[str, Split]
    held_out: bool = False  # whether "val" was cut from the images by us
    mirror_safe: bool = True  # whether a mirrored image keeps its label (digits do not)
    notes: tuple[str, ...] = ()  # what was passed over or looks wrong, a line each
    found: Found | None = field(default=None, repr=False, compare=False)  # before any was held out
    columns: Columns = field(default=FOUND, repr=False, compare=False)  # what the user said of a table

    @classmethod
    def from_dataset(
        cls,
        train: Dataset,
        val: Dataset | None = None,
        classes: Sequence[str] | None = None,
        *,
        val_fraction: float = 0.2,
        seed: int = 0,
    ) -> "ImageData":
        """Takes torch Datasets of (image, label) with a length.

        An image is a PIL picture, or a uint8 array or tensor, (H, W, C) or (C, H, W); give it as it is,
        for the preprocessing is the model's and the augmentation the recipe's. A label is the number or the
        name of a class, or a vector of 0 and 1 for all classes.

        Args:
            train: the training images.
            val: the validation images; None: some of the training images are held out, as in `open_data`.
            classes: their names; None: those that `train.classes` names, else the labels themselves.
            val_fraction: as in `open_data`.
            seed: as in `open_data`.

        Raises:
            VitralError: if there is nothing usable in them.
        """
        splits = {"train": train} if val is None else {"train": train, "val": val}
        name, found = read_datasets(splits, classes)
        return _divided(name, found, val_fraction, seed)

    @property
    def multi_label(self) -> bool:
        """Whether an image shows any number of classes, none included, rather than one."""
        return any(split.multi_label for split in self.splits.values())

    def split(self, name: str) -> Split:
        """Raises VitralError if there is no such split."""
        if name not in self.splits:
            raise VitralError(
                f"{self.source} has no {name!r} split; it has {', '.join(map(repr, self.splits))}"
            )
        return self.splits[name]

    def told(self, warn: Callable[[str], None]) -> "ImageData":
        """Gives itself, after `warn` is given each note."""
        for note in self.notes:
            warn(note)
        return self

    def describe(self) -> str:
        """Says what was found, in lines for people."""
        counts = ", ".join(f"{name} {len(split):,}" for name, split in self.splits.items())
        total = sum(map(len, self.splits.values()))
        train = self.splits["train"]
        per_class = class_counts(train.labels, len(self.classes))
        several = f", {train.labels.sum(1).mean():.1f} per image" if self.multi_label else ""
        sides = train.typical_sizes
        (h0, w0), (h, w), (h1, w1) = sides.min(0), np.median(sides, 0).astype(int), sides.max(0)
        size = f"{h}x{w}" if (h0, w0) == (h1, w1) else f"{h}x{w} (from {h0}x{w0} to {h1}x{w1})"
        how = ", val taken from each class and not trained on" if self.held_out else ""
        lines = (
            f"{self.source}: {total:,} images in {len(self.classes)} classes{several} "
            f"({shortened(self.classes)})\n"
            f"splits: {counts}{how}\n"
            f"        training images per class: {per_class.min():,} to {per_class.max():,}; "
            f"typical size {size}"
        )
        return "\n".join([lines, *self.notes])


# What data may be given as: the command line's DATA, a torch Dataset of (image, label), or what was opened.
DataSource = str | os.PathLike | Dataset | ImageData


def open_data(
    source: DataSource, *, val_fraction: float = 0.2, seed: int = 0, columns: Columns = FOUND
) -> ImageData:
    """Finds the images of an image folder, parquet files, ``digits`` or a torch Dataset.

    An image folder holds one folder per class, or ``train/`` with ``val/`` or ``test/`` that do, by any
    of their usual names. A parquet source is a file, a pattern, or either with ``{split}`` in it, in the
    Hugging Face layout (columns ``image`` and ``label`` or ``labels``); lists of labels, or vectors of 0
    and 1, make it multi-label. Of a Dataset, see `ImageData.from_dataset`. Where
    there is no validation split, one is held out of the training images, the same share of each class:
    `val_fraction`, or half that share (at most 2,500 images) where there is a test split to be the judge.

    Args:
        source: as the command line's DATA; or a Dataset of (image, label); or what was opened before, to hold
            out others of its images.
        val_fraction: share of the images to hold out; 0 for none.
        seed: of that choice; the same seed holds out the same images.
        columns: of a table, where its own names do not say.

    Raises:
        VitralError: if there is nothing usable there.
    """
    if isinstance(source, ImageData):
        again = source.found
        if again is None:
            return source
        kept: dict[str, Any] = {"mirror_safe": source.mirror_safe, "columns": source.columns}
        return replace(_divided(source.source, again, val_fraction, seed), **kept)
    if isinstance(source, Dataset):
        return ImageData.from_dataset(source, val_fraction=val_fraction, seed=seed)
    if not isinstance(source, str | os.PathLike):
        raise VitralError(
            f"data is a {type(source).__name__}; give {limits.DATA}, or a torch Dataset of (image, label) "
            "with a length"
        )
    found = find(os.fspath(source), columns)
    return replace(_divided(os.fspath(source), found, val_fraction, seed), columns=columns)


def _divided(source: str, found: Found, val_fraction: float, seed: int) -> ImageData:
    classes, splits = found.classes, dict(found.splits)
    _check(source, classes, splits)
    held_out = "val" not in splits and val_fraction > 0
    if held_out:
        train = splits.pop("train")
        fraction = val_fraction
        if "test" in splits:
            fraction = min(val_fraction / 2, _MAX_VAL_BESIDE_TEST / len(train))
        kept, val = hold_out(train, fraction, seed)
        splits = {"train": kept, "val": val, **splits}
    ordered = {name: splits[name] for name in SPLITS if name in splits}
    notes = (*found.notes, *note_on_doubles(ordered))
    return ImageData(
        source, classes, ordered, held_out, mirror_safe=source != "digits", notes=notes, found=found
    )


def _check(source: str, classes: tuple[str, ...], splits: dict[str, Split]) -> None:
    if not any(map(len, splits.values())):
        raise VitralError(f"{source} holds no images")
    if not classes:
        raise VitralError(f"{source}: not one image has a label; the lists of labels are all empty")
    if len(classes) < 2:
        raise VitralError(
            f"{source} has one class only, {classes[0]!r}; a classifier needs two or more folders"
        )
    for name, split in splits.items():
        missing = np.flatnonzero(class_counts(split.labels, len(classes)) == 0)
        if len(missing):
            empty = shortened([classes[index] for index in missing])
            raise VitralError(
                f"{source}: no images of {empty} in {name!r}; add some, or remove the empty class"
            )
