"""`Preprocess`: what a checkpoint expects of an image, as data and as a callable.

Which pictures there are and how they are decoded is `picture`'s; here an upright RGB picture becomes the
tensor that a model takes.
"""

import functools
import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import numpy as np
import PIL
from PIL import Image

from vitral.images.picture import ImageSource, decoded, open_image
from vitral.runtime.errors import ImageError, VitralError

if TYPE_CHECKING:  # an artifact's engine computes without torch
    import torch
    from torch import Tensor

Resize = Literal["shortest", "squash", "longest"]
Interpolation = Literal["nearest", "bilinear", "bicubic", "lanczos"]
CropRounding = Literal["even", "down"]

# "shortest" makes 1x100,000 pixels 22 million wide: a few bytes in a file, 15 GB in memory.
# A hundred million at most for the sizes that models take, whatever the shape.
MAX_RESIZED_PIXELS, MAX_TIMES_ENLARGED = 16_000_000, 64


@functools.lru_cache
def _channels(values: tuple[float, ...]) -> "Tensor":
    import torch

    return torch.tensor(values).view(-1, 1, 1)


@functools.lru_cache
def _line(values: tuple[float, ...], width: int, device: "torch.device") -> "Tensor":
    import torch

    return torch.tensor(values).repeat(width).to(device)


@dataclass(frozen=True)
class Preprocess:
    """An image of any kind and size -> a normalized tensor (C, H, W), float32.

    C is 3, or 1 for a model of grey images. It is stored with the weights: the same pixels reach the
    model in training's evaluation, in `eval`, in `predict` and anywhere else.
    """

    img_size: tuple[int, int]  # (height, width) in pixels that the model takes
    resize: Resize = "shortest"  # cover and crop; "squash" ignores the aspect; "longest" fits and pads
    crop_fraction: float = 1.0  # the centre kept after resizing to img_size / crop_fraction
    interpolation: Interpolation = "bicubic"
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)  # of each channel, RGB or grey, in 0..1
    std: tuple[float, ...] = (0.5, 0.5, 0.5)
    crop_rounding: CropRounding = "even"  # of half a pixel before the crop; "down" in transformers

    def __post_init__(self) -> None:
        if min(self.img_size) < 1 or min(self.std) <= 0 or not 0 < self.crop_fraction <= 1:
            raise ValueError(f"{self}: sizes and std must be above 0, crop_fraction above 0 and at most 1")
        if len(self.mean) != len(self.std):
            raise ValueError(f"{self}: mean and std are of the same channels")

    @property
    def channels(self) -> int:
        return len(self.mean)

    def for_channels(self, count: int) -> "Preprocess":
        """The same for another number of channels, each with the average mean and std of these."""
        if count == self.channels:
            return self
        mean, std = (sum(values) / len(values) for values in (self.mean, self.std))
        return replace(self, mean=(mean,) * count, std=(std,) * count)

    def __call__(self, source: ImageSource) -> "Tensor":
        """Raises ImageError if the image cannot be read."""
        return self.normalize(self.pixels(source))

    def pixels(self, source: ImageSource) -> np.ndarray:
        """Gives the 8-bit RGB that the model sees, (H, W, 3), before it is normalized; needs no torch.

        Raises:
            ImageError: if the image cannot be read.
        """
        with decoded(source) as image:
            return np.array(self.fit(self._seen(image)))

    def open(self, source: ImageSource) -> Image.Image:
        """As `open_image`, without colour where the model sees none.

        Raises:
            ImageError: if the image cannot be read.
            VitralError: if the model's channels are none that pictures have.
        """
        return self._seen(open_image(source))

    def _seen(self, image: Image.Image) -> Image.Image:
        if self.channels not in (1, 3):
            raise VitralError(
                f"the model takes {self.channels} channels, and pictures have 3, or 1 where they are grey; "
                f"in Python its module itself, `classifier.model`, takes tensors (B, {self.channels}, H, W)"
            )
        return image.convert("L").convert("RGB") if self.channels == 1 else image

    def fit(self, image: Image.Image) -> Image.Image:
        """The picture at exactly `img_size`: resized, its centre cut out, or padded with the mean colour."""
        resized = self.resized(image)
        target_h, target_w = self.img_size
        if resized.size == (target_w, target_h):
            return resized
        canvas = Image.new("RGB", (target_w, target_h), self.fill)
        place = self._offset(resized.width - target_w), self._offset(resized.height - target_h)
        canvas.paste(resized, place)
        return canvas

    @property
    def fill(self) -> tuple[int, ...]:
        """The mean colour, in RGB of 8 bits."""
        return tuple(round(255 * m) for m in (self.mean if self.channels == 3 else self.mean[:1] * 3))

    def resized(self, image: Image.Image) -> Image.Image:
        """The picture before its centre is cut out, or before it is padded."""
        height, width = self._resized_size(image)
        if height * width > max(MAX_RESIZED_PIXELS, MAX_TIMES_ENLARGED * math.prod(self.img_size)):
            raise ImageError(f"is too narrow to be resized, {image.width}x{image.height} pixels")
        return image.resize((width, height), Image.Resampling[self.interpolation.upper()])

    def normalize(self, image: Image.Image | np.ndarray) -> "Tensor":
        """8-bit RGB, or an array (H, W, 3) of it -> (C, H, W), (value / 255 - mean) / std."""
        import torch

        # Not torchvision's functions, which take as long to import as torch itself.
        pixels_HWC = torch.from_numpy(np.array(image))[..., : self.channels]
        pixels_CHW = pixels_HWC.permute(2, 0, 1).to(torch.float32, memory_format=torch.contiguous_format)
        pixels_CHW /= 255
        return pixels_CHW.sub_(_channels(self.mean)).div_(_channels(self.std))

    def normalize_pixels(self, pixels_BHWC: "Tensor") -> "Tensor":
        """`normalize` of bytes on any device: (B, H, W, 3) -> (B, C, H, W), the channels last in memory."""
        pixels_BHWC = pixels_BHWC[..., : self.channels]
        batch, height, width, channels = pixels_BHWC.shape
        # By whole lines of pixels, not by three numbers at a time.
        mean, std = (_line(values, width, pixels_BHWC.device) for values in (self.mean, self.std))
        lines_BHL = pixels_BHWC.flatten(2).float().div_(255).sub_(mean).div_(std)
        return lines_BHL.view(batch, height, width, channels).permute(0, 3, 1, 2)

    def _offset(self, excess: int) -> int:
        """Where the picture begins on the canvas; half of what is too much is cut before it."""
        # Python's rounding to even is torchvision's CenterCrop's too; all round padding down.
        rounded = round if self.crop_rounding == "even" and excess > 0 else int
        return -rounded(excess / 2)

    @property
    def target_size(self) -> tuple[int, int]:
        """(height, width) that are resized to, of which `crop_fraction` is kept."""
        height, width = (math.floor(side / self.crop_fraction + 1e-6) for side in self.img_size)
        return height, width

    def _resized_size(self, image: Image.Image) -> tuple[int, int]:
        """(height, width) to resize to before the centre is cut out."""
        target_h, target_w = self.target_size
        if self.resize == "squash":
            return target_h, target_w
        sides = image.height, image.width
        if self.resize == "shortest" and target_h == target_w:
            # Rounded down, as torchvision does with the longer side.
            height, width = (side * target_h // min(sides) for side in sides)
            return height, width
        ratios = image.height / target_h, image.width / target_w
        ratio = min(ratios) if self.resize == "shortest" else max(ratios)
        # Rounded, as timm does for rectangles and for what it pads.
        height, width = (max(round(side / ratio), 1) for side in sides)
        return height, width


def resizes_rows_first() -> bool:
    """Whether Pillow may resize rows before columns, which shows: between the two it rounds to bytes.

    From version 13 on it does so where more than twice as many rows go as columns (its pull request 9549).
    """
    return int(PIL.__version__.split(".")[0]) >= 13
