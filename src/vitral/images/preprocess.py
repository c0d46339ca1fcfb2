"""`Preprocess`: what a checkpoint expects of an image, as data and as a callable; and `open_image`."""

import functools
import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vitral.images.files import decodable, upright, why_not_read
from vitral.runtime.errors import ImageError, VitralError

ImageSource = str | Path | bytes | Image.Image | np.ndarray | Tensor
Resize = Literal["shortest", "squash", "longest"]
Interpolation = Literal["nearest", "bilinear", "bicubic", "lanczos"]
CropRounding = Literal["even", "down"]

# "shortest" makes 1x100,000 pixels 22 million wide: a few bytes in a file, 15 GB in memory.
# A hundred million at most for the sizes that models take, whatever the shape.
_MAX_RESIZED_PIXELS, _MAX_TIMES_ENLARGED = 16_000_000, 64
_BAND_PIXELS = 1_000_000


@functools.lru_cache
def _channels(values: tuple[float, ...]) -> Tensor:
    return torch.tensor(values).view(-1, 1, 1)


@functools.lru_cache
def _line(values: tuple[float, ...], width: int, device: torch.device) -> Tensor:
    return torch.tensor(values).repeat(width).to(device)


def open_image(source: ImageSource) -> Image.Image:
    """Any image as an upright 8-bit RGB picture.

    Args:
        source: a path, an encoded file's bytes, a PIL image, an array (H, W) or (H, W, C), or a
            tensor (C, H, W); arrays and tensors hold bytes 0..255 or floats 0..1.

    EXIF rotation is applied, an animation gives its first frame, transparency is laid on white, and
    16-bit grey is scaled to 8 bits.

    Raises:
        ImageError: if the image is missing, damaged, of an unknown kind or out of all proportion.
    """
    with _opened(source) as image:
        return image


@contextmanager
def _opened(source: ImageSource) -> Iterator[Image.Image]:
    """As `open_image`; inside, an encoded picture's place in memory is kept for it."""
    with ExitStack() as stack:
        try:
            image = _decoded(source, stack)
        except ImageError:
            raise
        except PermissionError as error:
            raise ImageError(why_not_read(error)) from error
        # Pillow's format plugins raise almost anything on damaged bytes: OSError, SyntaxError,
        # struct.error, IndexError, DecompressionBombError.
        except Exception as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            raise ImageError(f"cannot be decoded: {reason}") from error
        yield image


def _decoded(source: ImageSource, stack: ExitStack) -> Image.Image:
    match source:
        case Image.Image():
            upright = _upright_rgb(source)
            return upright.copy() if upright is source else upright
        case Tensor():
            array = source.detach().cpu().numpy()
            return _upright_rgb(_from_array(np.moveaxis(array, 0, -1) if array.ndim == 3 else array))
        case np.ndarray():
            return _upright_rgb(_from_array(source))
        case _:
            return _upright_rgb(stack.enter_context(decodable(source)))


def _from_array(array: np.ndarray) -> Image.Image:
    if np.issubdtype(array.dtype, np.floating):
        if not (np.isfinite(array).all() and array.min() >= 0 and array.max() <= 1):
            raise ValueError(f"floats from {array.min():g} to {array.max():g}; give 0..1, or bytes 0..255")
        array = np.rint(array * 255).astype(np.uint8)
    if array.ndim == 3 and array.shape[-1] == 1:
        array = array[..., 0]
    try:
        return Image.fromarray(np.ascontiguousarray(array))
    except TypeError as error:
        raise ValueError(
            f"{array.dtype} of shape {array.shape}; give bytes 0..255 or floats 0..1, with 1 to 4 channels"
        ) from error


def _upright_rgb(image: Image.Image) -> Image.Image:
    """The picture itself where it is upright RGB."""
    if 0 in image.size:
        raise ValueError("it has no pixels")
    image.seek(0)
    image.load()  # after which a TIFF is upright, and says so
    image = upright(image)
    if image.mode.startswith(("I", "F")):
        image = _eight_bits(image)
    if image.has_transparency_data:
        return _on_white(image)
    return image if image.mode == "RGB" else image.convert("RGB")


def _bands(image: Image.Image) -> Iterator[tuple[int, int, int, int]]:
    """Boxes of whole rows that make up the picture, so that what is done to each takes little memory."""
    rows = max(_BAND_PIXELS // image.width, 1)
    for top in range(0, image.height, rows):
        yield 0, top, image.width, min(top + rows, image.height)


def _on_white(image: Image.Image) -> Image.Image:
    """RGB of a transparent picture.

    The colour under full transparency is arbitrary, often black; people see such pictures on white.
    """
    result = Image.new("RGB", image.size)
    for box in _bands(image):
        overlay = image.crop(box).convert("RGBA")
        paper = Image.new("RGBA", overlay.size, "white")
        result.paste(Image.alpha_composite(paper, overlay).convert("RGB"), box)
    return result


def _eight_bits(image: Image.Image) -> Image.Image:
    """Grey of 8 bits. Integers above 255 are taken for 16-bit, floats up to 1 for the range 0..1."""
    bands = [(box, lambda box=box: _numbers(image.crop(box))) for box in _bands(image)]
    high = max(numbers().max() for _, numbers in bands)
    if image.mode.startswith("I"):
        scale = 1 / 257 if high > 255 or image.mode.startswith("I;16") else 1
    else:
        scale = 255 if high <= 1 else 1
    result = Image.new("L", image.size)
    for box, numbers in bands:
        result.paste(Image.fromarray(np.rint(numbers() * scale).clip(0, 255).astype(np.uint8)), box)
    return result


def _numbers(image: Image.Image) -> np.ndarray:
    return np.nan_to_num(np.asarray(image, dtype=np.float64))


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

    def __call__(self, source: ImageSource) -> Tensor:
        """Raises ImageError if the image cannot be read."""
        with _opened(source) as image:
            return self.normalize(self.fit(self._seen(image)))

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
        if height * width > max(_MAX_RESIZED_PIXELS, _MAX_TIMES_ENLARGED * math.prod(self.img_size)):
            raise ImageError(f"is too narrow to be resized, {image.width}x{image.height} pixels")
        return image.resize((width, height), Image.Resampling[self.interpolation.upper()])

    def normalize(self, image: Image.Image | np.ndarray) -> Tensor:
        """8-bit RGB, or an array (H, W, 3) of it -> (C, H, W), (value / 255 - mean) / std."""
        # Not torchvision's functions, which take as long to import as torch itself.
        pixels_HWC = torch.from_numpy(np.array(image))[..., : self.channels]
        pixels_CHW = pixels_HWC.permute(2, 0, 1).to(torch.float32, memory_format=torch.contiguous_format)
        pixels_CHW /= 255
        return pixels_CHW.sub_(_channels(self.mean)).div_(_channels(self.std))

    def normalize_pixels(self, pixels_BHWC: Tensor) -> Tensor:
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

    def _resized_size(self, image: Image.Image) -> tuple[int, int]:
        """(height, width) to resize to before the centre is cut out."""
        target_h, target_w = (math.floor(side / self.crop_fraction + 1e-6) for side in self.img_size)
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
