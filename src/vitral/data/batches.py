"""A batch of labelled images, how images are loaded into one, and what is done about damaged ones."""

import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from vitral.data.kept import Kept, Pictures
from vitral.data.randomness import seeded
from vitral.data.ring import Memory, new_memory
from vitral.data.split import Split, shortened
from vitral.runtime.errors import ImageError, VitralError

Transform = Callable[[Any], Tensor]
Move = tuple[int, int, int]  # as `Moves.decide` gives it
# Processor seconds that decoding and altering took, then the seconds that the run waited to have a batch on
# the device; in the order of `training/clock.py: LOADING`.
Seconds = tuple[float, float, float]


@dataclass(frozen=True)
class Batch:
    """Images (B, C, H, W) with labels: indices (B,), or 0 and 1 for each class, (B, L) in float32.

    Damaged images are left out, and named with the reason. As it comes from `collate` it may be of `pixels`:
    bytes (B, H, W, 3), a quarter of what the images are, which the device is to normalize.
    """

    images: Tensor
    labels: Tensor
    damaged: tuple[tuple[str, str], ...]
    rows: np.ndarray = field(default_factory=lambda: np.empty(0, dtype=np.int64))  # (B,) of the split
    seconds: Seconds = (0.0, 0.0, 0.0)
    pixels: bool = False

    @property
    def nbytes(self) -> int:
        return self.images.nbytes + self.labels.nbytes

    @property
    def asked(self) -> int:
        """How many images were asked for, damaged ones too."""
        return len(self.labels) + len(self.damaged)

    def pin_memory(self) -> "Batch":
        return replace(self, images=self.images.pin_memory(), labels=self.labels.pin_memory())

    def share_memory(self) -> "Batch":
        """Moves it to memory that other processes see."""
        return replace(self, images=self.images.share_memory_(), labels=self.labels.share_memory_())


class ImageKey(NamedTuple):
    """Names an image of a batch, and all that is random about it."""

    epoch: int
    row: int
    copy: int = 0
    move: Move | None = None


class LoadedImage(NamedTuple):
    """An image of a batch, a tensor or bytes (H, W, 3); a damaged one has no pixels, and the reason."""

    row: int
    label: np.ndarray
    pixels: Tensor | np.ndarray | None
    name: str = ""
    damage: str = ""
    decoding: float = 0.0  # seconds
    altering: float = 0.0


class ImageLoading(Dataset):
    """Loads one image by its `ImageKey`.

    Args:
        split: the images.
        load: takes the image, and its move if it has one: an `Undecoded` picture where there are `pictures`.
        seed: of all that is random about images; None: `load` draws nothing.
        pictures: the same images, as pictures.
        kept: where what was loaded is kept; for what is the same each time.
    """

    def __init__(
        self,
        split: Split,
        load: Callable[..., Tensor | np.ndarray],
        seed: int | None,
        pictures: Pictures | None = None,
        kept: Kept | None = None,
    ) -> None:
        self.split, self.load, self.seed, self.pictures, self.kept = split, load, seed, pictures, kept

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, index: ImageKey) -> LoadedImage:
        epoch, row, copy, move = index
        label, moved = self.split.labels[row], () if move is None else (move,)
        if self.kept is not None and (found := self.kept.get(row)) is not None:
            return LoadedImage(row, label, found)
        try:
            with self._drawing(epoch, row, copy):
                begun = time.perf_counter()
                pixels, decoding = self._loaded(row, moved)
                altering = time.perf_counter() - begun - decoding
        except ImageError as error:
            return LoadedImage(row, label, None, self.split.names[row], str(error))
        if self.kept is not None and isinstance(pixels, np.ndarray):
            self.kept.put(row, pixels)
        return LoadedImage(row, label, pixels, decoding=decoding, altering=altering)

    def _loaded(self, row: int, moved: tuple) -> tuple[Tensor | np.ndarray, float]:
        """The image, and the seconds that it took to read and to decode it."""
        begun = time.perf_counter()
        if self.pictures is None:
            image = self.split.images[row]
            read = time.perf_counter() - begun
            return self.load(image, *moved), read
        with self.pictures.opened(row) as picture:
            opened = time.perf_counter() - begun
            return self.load(picture, *moved), opened + picture.seconds

    def _drawing(self, epoch: int, row: int, copy: int) -> AbstractContextManager:
        if self.seed is None:
            return nullcontext()
        return seeded(self.seed, epoch, row, copy) if copy else seeded(self.seed, epoch, row)


def collate(images: Iterable[LoadedImage], count: int, memory: Memory = new_memory) -> Batch:
    """Puts images together as they are loaded, each written straight to where the batch stays.

    Args:
        images: of one size and kind, as many as `count` or fewer.
        count: the batch's images, damaged ones counted.
        memory: gives what the batch is written into.
    """
    rows, labels, damaged, decoding, altering = [], [], [], 0.0, 0.0
    stack: _Stack | None = None
    for image in images:
        if image.pixels is None:
            damaged.append((image.name, image.damage))
            continue
        stack = stack or _Stack(image.pixels, count, memory)
        stack.put(len(rows), image.pixels)
        rows.append(image.row)
        labels.append(image.label)
        decoding += image.decoding
        altering += image.altering
    numbers = torch.from_numpy(np.array(labels))
    return Batch(
        torch.empty(0) if stack is None else stack.tensor[: len(rows)],
        numbers.to(torch.float32 if numbers.ndim == 2 else torch.int64),
        tuple(damaged),
        np.array(rows, dtype=np.int64),
        (decoding, altering, 0.0),
        pixels=stack is not None and stack.of_bytes,
    )


class _Stack:
    """Memory for `count` images as `first` is, tensors or arrays of bytes."""

    def __init__(self, first: Tensor | np.ndarray, count: int, memory: Memory) -> None:
        self.of_bytes = isinstance(first, np.ndarray)
        kind = torch.uint8 if isinstance(first, np.ndarray) else first.dtype
        self.tensor = memory(count * first.nbytes).view(kind).view(count, *first.shape)
        self._like = first.shape, first.dtype
        self._places = self.tensor.numpy() if self.of_bytes else self.tensor

    def put(self, place: int, pixels: Any) -> None:
        if (pixels.shape, pixels.dtype) != self._like:  # which would be stretched or rounded
            raise ValueError(
                f"images of one batch differ: {pixels.dtype} {tuple(pixels.shape)} after "
                f"{self._like[1]} {tuple(self._like[0])}"
            )
        self._places[place] = pixels


class DamageCount:
    """Names each damaged image once, and stops a run that meets too many."""

    def __init__(self, total: int, limit: float, warn: Callable[[str], None]) -> None:
        if not 0 <= limit <= 1:
            raise VitralError(f"max_damaged={limit}: it must be a share of the images, from 0 to 1")
        self.total, self.limit, self.warn = total, limit, warn
        self.reasons: dict[str, str] = {}

    def add(self, batch: Batch) -> None:
        """Raises VitralError when more than `limit` of `total` images are damaged."""
        self.note(batch.damaged)

    def note(self, damaged: Iterable[tuple[str, str]]) -> None:
        """Does as `add`, for the names and reasons of damaged images."""
        for name, reason in damaged:
            if name not in self.reasons:
                self.reasons[name] = reason
                self.warn(f"skipped damaged image {name}: {reason}")
        if len(self.reasons) > self.limit * self.total:
            listed = shortened(list(self.reasons))
            raise VitralError(
                f"{len(self.reasons)} of {self.total:,} images are damaged, more than the limit of "
                f"{self.limit:.1%}: {listed}. Mend or remove them, or raise max_damaged"
            )
