"""A batch of labelled images, how images are loaded into one, and what is done about damaged ones."""

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from vitral.data.randomness import seeded
from vitral.data.split import Images, Split, shortened
from vitral.runtime.errors import ImageError, VitralError

Transform = Callable[[Any], Tensor]
Move = tuple[int, int, int]  # as `Moves.decide` gives it

# Of larger images, opening is a small part of all that a step does with them.
SMALL_PIXELS = 64 * 64
KEPT_BYTES = 512 * 2**20  # of a split


@dataclass(frozen=True)
class Batch:
    """Images (B, C, H, W) with labels: indices (B,), or 0 and 1 for each class, (B, L) in float32.

    Damaged images are left out, and named with the reason.
    """

    images: Tensor
    labels: Tensor
    damaged: tuple[tuple[str, str], ...]
    rows: np.ndarray = field(default_factory=lambda: np.empty(0, dtype=np.int64))  # (B,) of the split
    seconds: tuple[float, float] = (0.0, 0.0)  # that decoding and altering took, where they are told apart

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
    """An image of a batch; a damaged one has no pixels, and the reason."""

    row: int
    label: np.ndarray
    pixels: Tensor | None
    name: str = ""
    damage: str = ""
    seconds: tuple[float, float] = (0.0, 0.0)  # as of `Batch`


class ImageLoading(Dataset):
    """Loads one image by its `ImageKey`.

    Args:
        split: the images.
        load: takes the image, and its move if it has one.
        seed: of all that is random about images.
        decode: what comes before `load`, which then takes a picture rather than an encoded image.
    """

    def __init__(
        self,
        split: Split,
        load: Callable[..., Tensor],
        seed: int,
        decode: Callable[[Any], Image.Image] | None = None,
    ) -> None:
        self.split, self.load, self.seed, self.decode = split, load, seed, decode

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, index: ImageKey) -> LoadedImage:
        epoch, row, copy, move = index
        label, seed = self.split.labels[row], (self.seed, epoch, row, copy)
        try:
            with seeded(*seed if copy else seed[:3]):
                begun = time.perf_counter()
                image: Any = self.split.images[row]
                if self.decode is not None:
                    image = self.decode(image)
                decoded = time.perf_counter()
                pixels = self.load(image) if move is None else self.load(image, move)
                seconds = decoded - begun, time.perf_counter() - decoded
                return LoadedImage(row, label, pixels, seconds=seconds)
        except ImageError as error:
            return LoadedImage(row, label, None, self.split.names[row], str(error))


def collate(images: list[LoadedImage]) -> Batch:
    """Puts loaded images together."""
    sound = [image for image in images if image.pixels is not None]
    damaged = tuple((image.name, image.damage) for image in images if image.pixels is None)
    pixels = torch.stack([image.pixels for image in sound if image.pixels is not None]) if sound else None
    labels = torch.from_numpy(np.array([image.label for image in sound]))
    return Batch(
        torch.empty(0) if pixels is None else pixels,
        labels.to(torch.float32 if labels.ndim == 2 else torch.int64),
        damaged,
        np.array([image.row for image in sound], dtype=np.int64),
        (sum(image.seconds[0] for image in sound), sum(image.seconds[1] for image in sound)),
    )


class DecodedImages:
    """Decodes images, and keeps small ones, up to half a GiB in all.

    To open a JPEG of 32 pixels a side takes as long as all else that is done to load it (docs/log.md,
    2026-11-26).
    """

    def __init__(self, images: Images, open_image: Callable[[Any], Image.Image]) -> None:
        self._images, self._open = images, open_image
        self._kept: dict[int, np.ndarray] = {}
        self._room = KEPT_BYTES

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> Image.Image:
        if index in self._kept:
            return Image.fromarray(self._kept[index])
        image = self._open(self._images[index])
        size = 3 * image.width * image.height
        if image.width * image.height <= SMALL_PIXELS and size <= self._room:
            self._room -= size
            self._kept[index] = np.asarray(image)
        return image


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
