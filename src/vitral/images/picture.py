"""What a picture is once it is decoded, decided once: upright, RGB, 8 bits, no transparency.

`open_image` and `decoded` take whatever stands for a picture. Which files and formats are pictures, what they
may cost, and which way up a file says that it is, `files` decides.
"""

import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard

import numpy as np
from PIL import Image

from vitral.images.files import decodable, upright, upright_size, why_not_read
from vitral.images.turbo import turbo_pixels
from vitral.runtime.errors import ImageError

if TYPE_CHECKING:  # who gives a tensor has imported torch; an artifact's engine computes without
    from torch import Tensor

    ImageSource = str | Path | bytes | Image.Image | np.ndarray | Tensor
else:
    ImageSource = Any

# By which JPEG's inverse cosine transform divides each side: it computes 1, 2 or 4 pixels a side of each
# block of 8 (libjpeg, "scale_denom").
_SCALES = (8, 4, 2, 1)
_BAND_PIXELS = 1_000_000  # of a large picture, what is converted at a time


def open_image(source: ImageSource) -> Image.Image:
    """Decodes any image to an upright 8-bit RGB picture.

    Args:
        source: a path, an encoded file's bytes, a PIL image, an array (H, W) or (H, W, C), or a
            tensor (C, H, W); arrays and tensors hold bytes 0..255 or floats 0..1.

    EXIF rotation is applied, an animation gives its first frame, transparency is laid on white, and
    16-bit grey is scaled to 8 bits.

    Raises:
        ImageError: if the image is missing, damaged, of an unknown kind or out of all proportion.
    """
    with decoded(source) as image:
        return image


class Undecoded:
    """A picture of which no more than the size is known; whoever needs its pixels says how finely, once.

    Attributes:
        size: (height, width) in pixels, upright.
        scales: by which each side can be divided while it is decoded, falling; 1 is always among them.
        seconds: that decoding took.
    """

    def __init__(self, size: tuple[int, int], scales: tuple[int, ...] = (1,)) -> None:
        self.size, self.scales = size, scales
        self.seconds = 0.0

    def scale(self, most: float) -> int:
        """The largest scale that divides by no more than `most`."""
        return next((scale for scale in self.scales if scale <= most), 1)

    def decoded(self, scale: int = 1) -> Image.Image:
        """Upright 8-bit RGB. Raises ImageError if the image is damaged."""
        with self._timed(), _as_image_errors():
            return self._image(scale)

    def pixels(self, scale: int = 1) -> np.ndarray:
        """As `decoded`, bytes (H, W, 3), not to be written into: they may be kept for others."""
        with self._timed(), _as_image_errors():
            return self._pixels(scale)

    def _image(self, scale: int) -> Image.Image:
        raise NotImplementedError

    def _pixels(self, scale: int) -> np.ndarray:
        return np.array(self._image(scale))  # torch takes no array that may not be written into

    @contextmanager
    def _timed(self) -> Iterator[None]:
        begun = time.perf_counter()
        try:
            yield
        finally:
            self.seconds += time.perf_counter() - begun


class _Decoded(Undecoded):
    """A picture that is decoded already."""

    def __init__(self, image: Image.Image) -> None:
        super().__init__((image.height, image.width))
        self.image = image

    def _image(self, scale: int) -> Image.Image:  # noqa: ARG002 - there is one
        return self.image


class _Jpeg(Undecoded):
    """A JPEG whose header is read."""

    def __init__(self, image: Image.Image) -> None:
        super().__init__(upright_size(image), _SCALES)
        self.image = image

    def _image(self, scale: int) -> Image.Image:
        if scale > 1:
            # Takes the largest scale that keeps this size or more, which is the one that is meant.
            self.image.draft(None, (self.image.width // scale, self.image.height // scale))
        return _upright_rgb(self.image)

    def _pixels(self, scale: int) -> np.ndarray:
        found = turbo_pixels(self.image, scale)
        return super()._pixels(scale) if found is None else found


@contextmanager
def undecoded(source: ImageSource) -> Iterator[Undecoded]:
    """Open any image; inside, an encoded picture's place in memory is kept for it.

    A JPEG is decoded when its pixels are asked for: at a half, a quarter or an eighth of its size most of the
    work is spared. All else is decoded now.

    Raises:
        ImageError: as `open_image`.
    """
    with ExitStack() as stack:
        with _as_image_errors():
            picture = _picture_of(source, stack)
        yield picture


@contextmanager
def decoded(source: ImageSource, at_least: int | None = None) -> Iterator[Image.Image]:
    """As `open_image`; inside, an encoded picture's place in memory is kept for it.

    Args:
        source: as `open_image` takes it.
        at_least: pixels of each side that are enough; a JPEG of more is decoded at a half, a quarter or an
            eighth of its size.
    """
    with undecoded(source) as picture:
        most = 1 if at_least is None else min(picture.size) / at_least
        yield picture.decoded(picture.scale(most))


@contextmanager
def _as_image_errors() -> Iterator[None]:
    try:
        yield
    except ImageError:
        raise
    except PermissionError as error:
        raise ImageError(why_not_read(error)) from error
    # Pillow's format plugins raise almost anything on damaged bytes: OSError, SyntaxError, struct.error,
    # IndexError, DecompressionBombError.
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ImageError(f"cannot be decoded: {reason}") from error


def _picture_of(source: ImageSource, stack: ExitStack) -> Undecoded:
    match source:
        case Image.Image():
            upright = _upright_rgb(source)
            return _Decoded(upright.copy() if upright is source else upright)
        case np.ndarray():
            return _Decoded(_upright_rgb(_from_array(source)))
        case _ if is_tensor(source):
            array = source.detach().cpu().numpy()
            array = np.moveaxis(array, 0, -1) if array.ndim == 3 else array
            return _Decoded(_upright_rgb(_from_array(array)))
        case _:
            image = stack.enter_context(decodable(source))  # pyrefly: ignore[bad-argument-type]
            jpeg = image.format in ("JPEG", "MPO") and 0 not in image.size
            return _Jpeg(image) if jpeg else _Decoded(_upright_rgb(image))


def is_tensor(value: object) -> "TypeGuard[Tensor]":
    """Tells whether it is a tensor of torch, which is not imported for it."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.Tensor)


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
