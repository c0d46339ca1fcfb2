"""`Preprocess`: what a checkpoint expects of an image, as data and as a callable.

Which pictures there are and how they are decoded is `picture`'s; here an upright RGB picture becomes the
tensor that a model takes.
"""

import functools
import math
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import PIL
from PIL import Image

from vitral.images.picture import ImageSource, Undecoded, open_image, undecoded
from vitral.runtime.errors import ImageError, VitralError

if TYPE_CHECKING:  # an artifact's engine computes without torch
    import torch
    from torch import Tensor

Resize = Literal["shortest", "squash", "longest"]
Interpolation = Literal["nearest", "bilinear", "bicubic", "lanczos"]
CropRounding = Literal["even", "down"]
# How finely a JPEG is decoded. "full": every pixel. "fast" and "fastest": each side divided by 2, 4 or 8
# while at least so many pixels are left for each that is resized to.
Decoding = Literal["full", "fast", "fastest"]
_LEFT_FOR_ONE = {"full": math.inf, "fast": 2.0, "fastest": 1.0}

# "shortest" makes 1x100,000 pixels 22 million wide: a few bytes in a file, 15 GB in memory.
# A hundred million at most for the sizes that models take, whatever the shape.
MAX_RESIZED_PIXELS, MAX_TIMES_ENLARGED = 16_000_000, 64


@functools.lru_cache
def _channels(values: tuple[float, ...], device: "torch.device | str" = "cpu") -> "Tensor":
    import torch

    return torch.tensor(values).view(-1, 1, 1).to(device)


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
    decoding: Decoding = "full"  # how finely a JPEG is decoded

    def __post_init__(self) -> None:
        if self.decoding not in get_args(Decoding):
            raise ValueError(f"decoding={self.decoding}: it must be one of {', '.join(get_args(Decoding))}")
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

    def record(self) -> dict[str, Any]:
        """Give the fields for a file; without `decoding` where that is "full", as in files of before it."""
        fields = asdict(self)
        if self.decoding == "full":
            del fields["decoding"]
        return fields

    def __call__(self, source: ImageSource) -> "Tensor":
        """Raises ImageError if the image cannot be read."""
        return self.normalize(self.pixels(source))

    def pixels(self, source: ImageSource) -> np.ndarray:
        """Gives the 8-bit RGB that the model sees, (H, W, 3), before it is normalized; needs no torch.

        Raises:
            ImageError: if the image cannot be read.
        """
        with undecoded(source) as picture:
            return np.array(self.fit(picture))

    def open(self, source: ImageSource) -> Image.Image:
        """As `open_image`, without colour where the model sees none.

        Raises:
            ImageError: if the image cannot be read.
            VitralError: if the model's channels are none that pictures have.
        """
        return self.seen(open_image(source))

    def seen(self, image: Image.Image) -> Image.Image:
        """A decoded picture, without colour where the model sees none.

        Raises:
            VitralError: if the model's channels are none that pictures have.
        """
        if self.channels not in (1, 3):
            raise VitralError(
                f"the model takes {self.channels} channels, and pictures have 3, or 1 where they are grey; "
                f"in Python its module itself, `classifier.model`, takes tensors (B, {self.channels}, H, W)"
            )
        return image.convert("L").convert("RGB") if self.channels == 1 else image

    def fit(self, picture: Image.Image | Undecoded) -> Image.Image:
        """The picture at exactly `img_size`: resized, its centre cut out, or padded with the mean colour."""
        resized = self.resized(picture)
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

    def resized(self, picture: Image.Image | Undecoded) -> Image.Image:
        """The picture before its centre is cut out, or before it is padded.

        Args:
            picture: one that is decoded, as `open` gives it, or is yet to be.
        """
        decoded = isinstance(picture, Image.Image)
        size = (picture.height, picture.width) if decoded else picture.size
        height, width = self._resized_size(size)
        if height * width > max(MAX_RESIZED_PIXELS, MAX_TIMES_ENLARGED * math.prod(self.img_size)):
            raise ImageError(f"is too narrow to be resized, {size[1]}x{size[0]} pixels")
        if decoded or self.decoding == "full":
            image = picture if decoded else self.seen(picture.decoded())
            return image.resize((width, height), self._filter)
        return self._quickly(self._pixels(picture, size, (height, width)), (height, width))

    def cut(self, picture: Undecoded, box: tuple[int, int, int, int]) -> Image.Image:
        """A part of the picture at exactly `img_size`.

        Args:
            picture: yet to be decoded.
            box: (top, left, height, width) in its pixels.
        """
        top, left, height, width = box
        if self.decoding == "full":
            part = self.seen(picture.decoded()).crop((left, top, left + width, top + height))
            return part.resize(self.img_size[::-1], self._filter)
        pixels_HWC = self._pixels(picture, (height, width), self.img_size)
        ends = np.array([[top, top + height], [left, left + width]])
        shares = np.array(pixels_HWC.shape[:2]) / picture.size
        rows, columns = (slice(*pair) for pair in np.floor(ends * shares[:, None] + 0.5).astype(int).tolist())
        return self._quickly(pixels_HWC[rows, columns], self.img_size)

    @property
    def _filter(self) -> Image.Resampling:
        return Image.Resampling[self.interpolation.upper()]

    def _pixels(self, picture: Undecoded, used: tuple[int, int], wanted: tuple[int, int]) -> np.ndarray:
        """As finely as `decoding` says, where `used` pixels of it become `wanted` ones."""
        most = min(side / left for side, left in zip(used, wanted, strict=True))
        scale = picture.scale(most / _LEFT_FOR_ONE[self.decoding])
        return picture.pixels(scale) if self.channels == 3 else np.array(self.seen(picture.decoded(scale)))

    def _quickly(self, pixels_HWC: np.ndarray, size: tuple[int, int]) -> Image.Image:
        """Resize by torch: on bytes 1.3 to 7 times as fast as Pillow, and a grey level off at most.

        One value in 300 differed (docs/benchmarks.md).
        """
        enlarges = math.prod(size) >= math.prod(pixels_HWC.shape[:2])  # which Pillow does as fast
        if enlarges or self.interpolation not in ("bilinear", "bicubic"):  # torch smooths with these alone
            return Image.fromarray(pixels_HWC).resize(size[::-1], self._filter)
        import torch
        from torch.nn import functional

        # As a batch of one before it is turned: torch then sees that channels come last, and leaves them so.
        pixels_BCHW = torch.from_numpy(pixels_HWC)[None].permute(0, 3, 1, 2)
        resized_BCHW = functional.interpolate(pixels_BCHW, size, mode=self.interpolation, antialias=True)
        return Image.fromarray(resized_BCHW.permute(0, 2, 3, 1)[0].numpy())

    def normalize(self, image: Image.Image | np.ndarray) -> "Tensor":
        """8-bit RGB, or an array (H, W, 3) of it -> (C, H, W), (value / 255 - mean) / std."""
        import torch

        # Not torchvision's functions, which take as long to import as torch itself.
        return self.normalize_pixels(torch.from_numpy(np.array(image)[None]))[0]

    def normalize_pixels(self, pixels_BHWC: "Tensor") -> "Tensor":
        """`normalize` of bytes on any device: (B, H, W, 3) -> (B, C, H, W)."""
        import torch

        # The bytes are turned round, a quarter of what floats are; then each plane is gone over as a whole.
        planes_BCHW = pixels_BHWC[..., : self.channels].permute(0, 3, 1, 2).contiguous()
        mean, std = (_channels(values, planes_BCHW.device) for values in (self.mean, self.std))
        return planes_BCHW.to(torch.float32).div_(255).sub_(mean).div_(std)

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

    def _resized_size(self, sides: tuple[int, int]) -> tuple[int, int]:
        """(height, width) to resize a picture of such `sides` to, before the centre is cut out."""
        target_h, target_w = self.target_size
        if self.resize == "squash":
            return target_h, target_w
        if self.resize == "shortest" and target_h == target_w:
            # Rounded down, as torchvision does with the longer side.
            height, width = (side * target_h // min(sides) for side in sides)
            return height, width
        ratios = sides[0] / target_h, sides[1] / target_w
        ratio = min(ratios) if self.resize == "shortest" else max(ratios)
        # Rounded, as timm does for rectangles and for what it pads.
        height, width = (max(round(side / ratio), 1) for side in sides)
        return height, width


def resizes_rows_first() -> bool:
    """Whether Pillow may resize rows before columns, which shows: between the two it rounds to bytes.

    From version 13 on it does so where more than twice as many rows go as columns (its pull request 9549).
    """
    return int(PIL.__version__.split(".")[0]) >= 13
