"""What training adds to `Preprocess`, by torchvision: crops, flips, colours and erasing; mixup and cutmix."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms import v2

from vitral.images.augmentation import Augmentation, margin_of, mirrored_edges
from vitral.images.picture import ImageSource
from vitral.images.preprocess import Preprocess


def training_transform(preprocess: Preprocess, augmentation: Augmentation) -> Callable[[ImageSource], Tensor]:
    """Builds what turns an image of any kind into a randomly altered, normalized tensor (C, H, W).

    All randomness comes from torch's global generator.

    Args:
        preprocess: size, interpolation, mean and std of the result.
        augmentation: what is altered.
    """
    return v2.Compose([preprocess.open, alteration(preprocess, augmentation)])


def alteration(preprocess: Preprocess, augmentation: Augmentation) -> Callable[[Image.Image], Tensor]:
    """Builds what `training_transform` does to a picture once it is opened."""
    steps: list[Callable] = [_cropper(preprocess, augmentation)]
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


def _cropper(preprocess: Preprocess, augmentation: Augmentation) -> Callable[[Image.Image], Image.Image]:
    height, width = preprocess.img_size
    match augmentation.crop:
        case "none":
            return preprocess.fit
        case "padded":
            shift = _ShiftedCrop((height, width), (margin_of(height), margin_of(width)))
            return v2.Compose([preprocess.fit, shift])
        case "simple":
            cover = replace(preprocess, resize="shortest", crop_fraction=1.0)
            margin = min(4, margin_of(height)), min(4, margin_of(width))
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
