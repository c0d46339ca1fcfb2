"""What training adds to `Preprocess`, by torchvision: crops, flips, colours and erasing; mixup and cutmix."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms import v2

from vitral.images.augmentation import Augmentation, margin_of, mirrored_edges
from vitral.images.picture import ImageSource, Undecoded, undecoded
from vitral.images.preprocess import Preprocess

Altered = Callable[[Undecoded], "Tensor | np.ndarray"]


def training_transform(preprocess: Preprocess, augmentation: Augmentation) -> Callable[[ImageSource], Tensor]:
    """Builds what turns an image of any kind into a randomly altered, normalized tensor (C, H, W).

    All randomness comes from torch's global generator.

    Args:
        preprocess: size, interpolation, mean and std of the result, and how finely it is decoded.
        augmentation: what is altered.
    """
    altered = alteration(preprocess, augmentation)

    def transform(source: ImageSource) -> Tensor:
        with undecoded(source) as picture:
            pixels = altered(picture)
        return pixels if isinstance(pixels, Tensor) else preprocess.normalize(pixels)

    return transform


def alteration(preprocess: Preprocess, augmentation: Augmentation) -> Altered:
    """Builds what alters a picture at random: it gives bytes (H, W, 3), which are yet to be normalized.

    Where `augmentation` erases, it gives the normalized tensor (C, H, W): the noise has the mean and spread
    of normalized pixels.
    """
    crop = _cropper(preprocess, augmentation)
    steps: list[Callable] = []
    if augmentation.flip:
        steps.append(_flipped_or_not)
    if augmentation.three_augment:
        steps.append(_three_augment(preprocess.img_size))
    if augmentation.rand_augment:
        steps += _rand_augment(augmentation, fill=list(preprocess.fill))
    if augmentation.color_jitter:
        # v2.ColorJitter takes a number for "up to this share more or less".
        steps.append(v2.ColorJitter(*[augmentation.color_jitter] * 3))
    if augmentation.erasing:
        erase = v2.RandomErasing(augmentation.erasing, value="random")  # type: ignore[arg-type]
        steps += [preprocess.normalize, erase]

    def altered(picture: Undecoded) -> Tensor | np.ndarray:
        image: Any = crop(picture)
        for step in steps:
            image = step(image)
        return image if isinstance(image, Tensor) else np.asarray(image)

    return altered


def _cropper(preprocess: Preprocess, augmentation: Augmentation) -> Callable[[Undecoded], Image.Image]:
    height, width = preprocess.img_size
    match augmentation.crop:
        case "none":
            return preprocess.fit
        case "padded":
            shift = _ShiftedCrop((height, width), (margin_of(height), margin_of(width)))
            return lambda picture: shift(preprocess.fit(picture))
        case "simple":
            cover = replace(preprocess, resize="shortest", crop_fraction=1.0)
            simple = _ShiftedCrop((height, width), (min(4, margin_of(height)), min(4, margin_of(width))))
            return lambda picture: simple(cover.resized(picture))
        case "resized":
            return _ResizedCrop(preprocess, augmentation.crop_scale)


def _flipped_or_not(image: Image.Image) -> Image.Image:
    """As torchvision's RandomHorizontalFlip, which takes ten times as long to find out what it was given."""
    return image if torch.rand(1) >= 0.5 else image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)


class _ResizedCrop:
    """A random part, enlarged or reduced to the model's size; drawn before the picture is decoded.

    So it can be decoded no more finely than the part needs. The draws are torchvision's, and of a picture
    that is decoded in full the pixels too.
    """

    def __init__(self, preprocess: Preprocess, smallest: float) -> None:
        self.preprocess = preprocess
        self._draws = v2.RandomResizedCrop(preprocess.img_size, scale=(smallest, 1.0))

    def __call__(self, picture: Undecoded) -> Image.Image:
        drawn = self._draws.make_params([torch.empty(3, *picture.size, device="meta")])
        return self.preprocess.cut(picture, (drawn["top"], drawn["left"], drawn["height"], drawn["width"]))


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
    return mirrored_edges(side, margin)[first : first + wanted]


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
    """Builds what mixes images (B, C, H, W) and labels into images and target probabilities (B, L).

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
