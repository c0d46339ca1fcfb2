"""Pictures within the page: small, in the page itself, and no more of them than the page may weigh."""

import base64
import io
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from PIL import Image

from vitral.data.split import Images
from vitral.images.picture import open_image
from vitral.reports.blocks import Picture
from vitral.runtime.errors import ImageError

_COARSE = 48  # pixels of a side below which an image's own pixels are shown
_QUALITY = 80


@dataclass
class Pictures:
    """What pictures a page may have, and how many it had to leave out."""

    budget: int  # bytes of the page that pictures may take
    wanted: bool = True
    taken: int = 0
    left_out: dict[str, int] = field(default_factory=dict)  # pictures, by what they were for

    def of(self, images: Images, row: int, side: int, use: str) -> Picture | None:
        """Give an image of a data source, of at most so many pixels a side; None: there is no room."""
        return self._taken(use, lambda: thumbnail(_opened(images, row), side))

    def drawn(
        self, image: Image.Image, side: int, use: str, over: Image.Image | None = None, alt: str = ""
    ) -> Picture | None:
        """Give a picture that was computed, perhaps with a map over it."""
        return self._taken(use, lambda: replace(thumbnail(image, side, over), alt=alt))

    def whole(self, content: bytes, kind: str, size: tuple[int, int], use: str) -> Picture | None:
        """Give an encoded figure of (width, height) pixels as it is."""
        return self._taken(use, lambda: Picture(_uri(kind, content), *size))

    def _taken(self, use: str, make: Callable[[], Picture]) -> Picture | None:
        if not self.wanted:
            return None
        picture = make()
        size = len(picture.uri) + len(picture.over)
        if self.taken + size > self.budget:
            self.left_out[use] = self.left_out.get(use, 0) + 1
            return None
        self.taken += size
        return picture


def _opened(images: Images, row: int) -> Image.Image:
    try:
        return open_image(images[row])
    except ImageError:  # it could be read a moment ago
        return Image.new("RGB", (8, 8), "grey")


def thumbnail(image: Image.Image, side: int, over: Image.Image | None = None) -> Picture:
    """Give an image as a data URI, no larger than it is; small ones keep their pixels."""
    coarse = max(image.size) <= _COARSE
    if not coarse:
        image = image.copy()
        image.thumbnail((side, side), Image.Resampling.LANCZOS)
    content = io.BytesIO()
    if coarse:
        image.convert("RGB").save(content, "PNG", optimize=True)
    uri = _uri("png", content.getvalue()) if coarse else _jpeg(image)
    return Picture(uri, *image.size, _jpeg(over) if over else "", coarse)


def _jpeg(image: Image.Image) -> str:
    content = io.BytesIO()
    image.convert("RGB").save(content, "JPEG", quality=_QUALITY, optimize=True)
    return _uri("jpeg", content.getvalue())


def _uri(kind: str, content: bytes) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
