"""`Augmentation`: how training alters images at random; `Moves`: what of it is done by indexing alone.

`augment` does the rest by torchvision, whose import takes as long as torch's: evaluation does without it.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, Self

import numpy as np
import torch
from torch import Tensor

Crop = Literal["padded", "resized", "simple", "none"]


@dataclass(frozen=True)
class Augmentation:
    """How a training image is altered at random, in the order of the fields; the defaults alter nothing.

    `crop` is "resized", a random part enlarged to the model's size (Inception's, arXiv:1409.4842);
    "simple", the image reduced until its shorter side fits and cut anywhere, up to 4 mirrored pixels
    over its edge (DeiT-III, arXiv:2204.07118); "padded", shifted by up to an eighth, for images already
    as small as the model takes; or "none".
    """

    crop: Crop = "none"
    crop_scale: float = 0.35  # smallest part of the area that "resized" keeps
    flip: bool = False  # mirror every other image
    three_augment: bool = False  # one of grey, solarized and blurred (DeiT-III)
    # RandAugment (arXiv:1909.13719): magnitude, 0 to 30, where 30 is level 10 of the paper's code and
    # of timm; 0 is off. Then how many operations, and the probability of each.
    rand_augment: float = 0.0
    rand_augment_ops: int = 2
    rand_augment_share: float = 1.0
    color_jitter: float = 0.0  # largest change of brightness, contrast and saturation, as a share
    erasing: float = 0.0  # probability of a rectangle of noise (arXiv:1708.04896)

    @property
    def only_moves(self) -> bool:
        """Whether `Moves` can do it: pixels are shifted and mirrored at most."""
        colours = self.three_augment, self.rand_augment, self.color_jitter, self.erasing
        return self.crop in ("padded", "none") and not any(colours)


@dataclass(frozen=True)
class Moves:
    """Shifts over mirrored edges and mirror images, of pixels that fit the model already.

    What is done to an image is decided by numbers that are the image's own, and done by indexing: to a
    picture alone and to many on a device alike, to the bit.
    """

    size: tuple[int, int]  # (height, width) of the images
    margin: tuple[int, int]  # by how many pixels they are shifted at most
    flip: bool

    NUMBERS: ClassVar[int] = 3  # that an image is decided by

    @classmethod
    def of(cls, augmentation: Augmentation, size: tuple[int, int]) -> Self:
        """Takes an augmentation that `only_moves`."""
        shifts = augmentation.crop == "padded"
        return cls(size, (margin_of(size[0]), margin_of(size[1])) if shifts else (0, 0), augmentation.flip)

    def decide(self, numbers_B3: np.ndarray) -> np.ndarray:
        """Turns numbers from 0 to 1 into moves (B, 3): the first row and column, and 1 for mirrored."""
        moves_B3 = np.empty(numbers_B3.shape, dtype=np.int64)
        moves_B3[:, :2] = numbers_B3[:, :2] * (2 * np.array(self.margin) + 1)
        moves_B3[:, 2] = self.flip & (numbers_B3[:, 2] < 0.5)
        return moves_B3

    def one(self, pixels_HWC: np.ndarray, move: Sequence[int]) -> np.ndarray:
        """Moves a picture."""
        (height, width), (top, left, mirrored) = self.size, move
        rows = mirrored_edges(height, self.margin[0])[top : top + height]
        columns = mirrored_edges(width, self.margin[1])[left : left + width]
        return pixels_HWC[rows[:, None], columns[::-1] if mirrored else columns]

    def many(self, pixels_NHWC: Tensor, rows_B: Tensor, moves_B3: Tensor) -> Tensor:
        """Moves the images of these rows, (B, H, W, C), all on one device, in one indexing."""
        (count,), (height, width), channels = rows_B.shape, self.size, pixels_NHWC.shape[-1]
        down_BH, across_BW = (
            _edges_on(rows_B.device, side, margin)[
                moves_B3[:, axis, None] + torch.arange(side, device=rows_B.device)
            ]
            for axis, (side, margin) in enumerate(zip(self.size, self.margin, strict=True))
        )
        if self.flip:
            across_BW = torch.where(moves_B3[:, 2:].bool(), across_BW.flip(1), across_BW)
        # As one index of all pixels: two and a half times as fast as three.
        lines_BH = rows_B[:, None] * height + down_BH
        places_BHW = lines_BH[:, :, None] * width + across_BW[:, None, :]
        return pixels_NHWC.view(-1, channels)[places_BHW.flatten()].view(count, height, width, channels)


@functools.lru_cache
def _edges_on(device: torch.device, side: int, margin: int) -> Tensor:
    return torch.from_numpy(mirrored_edges(side, margin)).to(device)


def margin_of(side: int) -> int:
    """By how many pixels "padded" shifts at most."""
    return side // 8


@functools.lru_cache
def mirrored_edges(side: int, margin: int) -> np.ndarray:
    """The pixel at each place of a row of `side` with `margin` more before and behind, mirrored there."""
    places = np.abs(np.arange(-margin, side + margin))
    return np.where(places < side, places, 2 * (side - 1) - places)
