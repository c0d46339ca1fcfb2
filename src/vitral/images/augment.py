"""What a training run adds to `Preprocess`: random crops, flips, colours and erasing; mixup and cutmix."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, Self

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms import v2

from vitral.images.picture import ImageSource
from vitral.images.preprocess import Preprocess

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


def training_transform(preprocess: Preprocess, augmentation: Augmentation) -> Callable[[ImageSource], Tensor]:
    """An image of any kind -> a randomly altered, normalized tensor (C, H, W).

    All randomness comes from torch's global generator.

    Args:
        preprocess: size, interpolation, mean and std of the result.
        augmentation: what is altered.
    """
    steps: list[Callable] = [preprocess.open, _cropper(preprocess, augmentation)]
    if augmentation.flip:
        steps.append(v2.RandomHorizontalFlip())
    if augmentation.three_augment:
        steps.append(_three_augment(preprocess.img_size))
    if augmentation.rand_augment:
        steps += _rand_augment(augmentation, fill=list(preprocess.fill))
    if augmentation.color_jitter:
        # v2.ColorJitter takes a number for "up to this share more or less".
        steps.append(v2.ColorJitter(*[augmentation.color_jitter] * 3))
    steps.append(preprocess.normalize)
    if augmentation.erasing:
        # After normalization, so that the noise has the mean and spread of pixels.
        steps.append(v2.RandomErasing(augmentation.erasing, value="random"))  # type: ignore[arg-type]
    return v2.Compose(steps)


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
        return cls(size, (_margin(size[0]), _margin(size[1])) if shifts else (0, 0), augmentation.flip)

    def decide(self, numbers_B3: np.ndarray) -> np.ndarray:
        """Turns numbers from 0 to 1 into moves (B, 3): the first row and column, and 1 for mirrored."""
        moves_B3 = np.empty(numbers_B3.shape, dtype=np.int64)
        moves_B3[:, :2] = numbers_B3[:, :2] * (2 * np.array(self.margin) + 1)
        moves_B3[:, 2] = self.flip & (numbers_B3[:, 2] < 0.5)
        return moves_B3

    def one(self, pixels_HWC: np.ndarray, move: Sequence[int]) -> np.ndarray:
        """Moves a picture."""
        (height, width), (top, left, mirrored) = self.size, move
        rows = _mirrored_edges(height, self.margin[0])[top : top + height]
        columns = _mirrored_edges(width, self.margin[1])[left : left + width]
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


def _cropper(preprocess: Preprocess, augmentation: Augmentation) -> Callable[[Image.Image], Image.Image]:
    height, width = preprocess.img_size
    match augmentation.crop:
        case "none":
            return preprocess.fit
        case "padded":
            shift = _ShiftedCrop((height, width), (_margin(height), _margin(width)))
            return v2.Compose([preprocess.fit, shift])
        case "simple":
            cover = replace(preprocess, resize="shortest", crop_fraction=1.0)
            margin = min(4, _margin(height)), min(4, _margin(width))
            return v2.Compose([cover.resized, _ShiftedCrop((height, width), margin)])
        case "resized":
            return v2.RandomResizedCrop(
                (height, width),
                scale=(augmentation.crop_scale, 1.0),
                interpolation=v2.InterpolationMode(preprocess.interpolation),
            )


class _ShiftedCrop:
    """`size` pixels cut out anywhere, up to `margin` of them over the edge, where the picture is mirrored.

    As torchvision's RandomCrop with reflecting padding; by indices, for padding each small image took a
    sixth of a step (docs/log.md, 2026-11-25).
    """

    def __init__(self, size: tuple[int, int], margin: tuple[int, int]) -> None:
        self.size, self.margin = size, margin  # (height, width)

    def __call__(self, image: Image.Image) -> Image.Image:
        pixels_HWC = np.asarray(image)
        rows, columns = (
            _places(*sides) for sides in zip(pixels_HWC.shape, self.size, self.margin, strict=False)
        )
        return Image.fromarray(pixels_HWC[rows[:, None], columns])


def _places(side: int, wanted: int, margin: int) -> np.ndarray:
    """Which of `side` pixels a random cut takes, in order."""
    first = int(torch.randint(side - wanted + 2 * margin + 1, ()))
    return _mirrored_edges(side, margin)[first : first + wanted]


@functools.lru_cache
def _edges_on(device: torch.device, side: int, margin: int) -> Tensor:
    return torch.from_numpy(_mirrored_edges(side, margin)).to(device)


def _margin(side: int) -> int:
    """By how many pixels "padded" shifts at most."""
    return side // 8


@functools.lru_cache
def _mirrored_edges(side: int, margin: int) -> np.ndarray:
    """The pixel at each place of a row of `side` with `margin` more before and behind, mirrored there."""
    places = np.abs(np.arange(-margin, side + margin))
    return np.where(places < side, places, 2 * (side - 1) - places)


def _three_augment(size: tuple[int, int]) -> v2.Transform:
    """DeiT-III's 3-Augment (arXiv:2204.07118), with the numbers of the authors' `augment.py`."""
    # Three standard deviations to each side; no wider than a picture can be mirrored.
    kernel = min(13, 2 * min(size) - 1)
    blur = v2.GaussianBlur(kernel, sigma=(0.1, 2.0))
    return v2.RandomChoice([v2.Grayscale(3), v2.RandomSolarize(128, p=1.0), blur])


def _rand_augment(augmentation: Augmentation, fill: list[int]) -> list[v2.Transform]:
    magnitude = round(augmentation.rand_augment)
    count, share = augmentation.rand_augment_ops, augmentation.rand_augment_share
    if share == 1:
        return [v2.RandAugment(num_ops=count, magnitude=magnitude, fill=fill)]
    once = v2.RandAugment(num_ops=1, magnitude=magnitude, fill=fill)
    return [v2.RandomApply([once], p=share)] * count


def batch_mixer(
    mixup: float, cutmix: float, num_classes: int
) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Images (B, C, H, W) and labels -> mixed images and target probabilities (B, L).

    Labels are indices (B,), or 0 and 1 for each class, (B, L); the images of a pair give each class their
    shares, so that a class in both keeps 1.

    Args:
        mixup: alpha of mixup (arXiv:1710.09412); 0 is off.
        cutmix: alpha of CutMix (arXiv:1905.04899); 0 is off. With both on, each batch takes one of the
            two with equal probability (DeiT's `--mixup-switch-prob 0.5`).
        num_classes: L.
    """
    mixers: list[v2.Transform] = []
    # torchvision draws the share from a distribution that knows no integers.
    if mixup:
        mixers.append(v2.MixUp(alpha=float(mixup), num_classes=num_classes))
    if cutmix:
        mixers.append(v2.CutMix(alpha=float(cutmix), num_classes=num_classes))
    if mixers:
        return v2.RandomChoice(mixers)
    return lambda images, labels: (images, _targets(labels, num_classes).to(images.dtype))


def _targets(labels: Tensor, num_classes: int) -> Tensor:
    return F.one_hot(labels, num_classes) if labels.ndim == 1 else labels
