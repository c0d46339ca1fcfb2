"""What a training run adds to `Preprocess`: random crops, flips and RandAugment; mixup and cutmix."""

from collections.abc import Callable
from typing import Literal

from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms import v2

from vitral.preprocess import ImageSource, Preprocess, open_image

Crop = Literal["padded", "resized", "none"]


def training_transform(
    preprocess: Preprocess, crop: Crop, crop_scale: float, *, flip: bool, rand_augment: float
) -> Callable[[ImageSource], Tensor]:
    """An image of any kind -> a randomly altered, normalized tensor (3, H, W).

    All randomness comes from torch's global generator.

    Args:
        preprocess: size, interpolation, mean and std of the result.
        crop: "resized" cuts out a random part (Inception's, arXiv:1409.4842); "padded" shifts by up
            to an eighth, for images already as small as the model takes; "none" only preprocesses.
        crop_scale: smallest part of the area that "resized" keeps.
        flip: mirror every other image.
        rand_augment: magnitude of two RandAugment operations (arXiv:1909.13719), 0 to 30; 0 is off.
    """
    steps: list[Callable] = [open_image, _cropper(preprocess, crop, crop_scale)]
    if flip:
        steps.append(v2.RandomHorizontalFlip())
    if rand_augment:
        grey = [round(255 * m) for m in preprocess.mean]
        steps.append(v2.RandAugment(num_ops=2, magnitude=round(rand_augment), fill=grey))
    steps.append(preprocess.normalize)
    return v2.Compose(steps)


def _cropper(preprocess: Preprocess, crop: Crop, crop_scale: float) -> Callable[[Image.Image], Image.Image]:
    height, width = preprocess.img_size
    if crop == "none":
        return preprocess.fit
    if crop == "padded":
        padding = [width // 8, height // 8]
        shift = v2.RandomCrop((height, width), padding=padding, padding_mode="reflect")
        return v2.Compose([preprocess.fit, shift])
    return v2.RandomResizedCrop(
        (height, width),
        scale=(crop_scale, 1.0),
        interpolation=v2.InterpolationMode(preprocess.interpolation),
    )


def batch_mixer(
    mixup: float, cutmix: float, num_classes: int
) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Images (B, C, H, W) and labels (B,) -> mixed images and target probabilities (B, L).

    Args:
        mixup: alpha of mixup (arXiv:1710.09412); 0 is off.
        cutmix: alpha of CutMix (arXiv:1905.04899); 0 is off. With both on, each batch takes one.
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
    return lambda images, labels: (images, F.one_hot(labels, num_classes).to(images.dtype))
