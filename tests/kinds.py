"""One picture as files of eleven kinds, as people have them."""

import io
from collections.abc import Callable

import numpy as np
from PIL import Image


def _jpeg(image: Image.Image, mode: str = "RGB", **options: object) -> bytes:
    return _file(image.convert(mode), "JPEG", **{"quality": 90, **options})


def _turned(image: Image.Image) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6  # it is to be turned by a quarter
    return _file(image, "JPEG", quality=90, exif=exif)


def _transparent(image: Image.Image) -> bytes:
    alpha = np.linspace(0, 255, image.width * image.height).reshape(image.height, image.width)
    image = image.copy()
    image.putalpha(Image.fromarray(alpha.astype(np.uint8)))
    return _file(image, "PNG")


def _deep(image: Image.Image) -> bytes:
    grey = np.asarray(image.convert("L"), np.uint16) * 257
    noise = np.random.default_rng(grey.size).integers(0, 250, grey.shape, np.uint16)
    return _file(Image.fromarray(np.minimum(grey.astype(np.uint32) + noise, 65535).astype(np.uint16)), "PNG")


def _file(image: Image.Image, kind: str, **options: object) -> bytes:
    content = io.BytesIO()
    image.save(content, kind, **options)
    return content.getvalue()


# Name of the kind and of its files' ending -> bytes of an RGB picture.
KINDS: dict[str, tuple[str, Callable[[Image.Image], bytes]]] = {
    "JPEG 4:2:0": ("jpg", lambda image: _jpeg(image, subsampling=2)),
    "JPEG 4:4:4": ("jpg", lambda image: _jpeg(image, subsampling=0)),
    "JPEG, progressive": ("jpg", lambda image: _jpeg(image, progressive=True)),
    "JPEG, turned by EXIF": ("jpg", _turned),
    "JPEG, grey": ("jpg", lambda image: _jpeg(image, "L")),
    "JPEG, CMYK": ("jpg", lambda image: _jpeg(image, "CMYK")),
    "PNG, transparent": ("png", _transparent),
    "PNG, palette": ("png", lambda image: _file(image.quantize(64), "PNG")),
    "PNG, 16 bits": ("png", _deep),
    "WebP": ("webp", lambda image: _file(image, "WEBP", quality=85)),
    "AVIF": ("avif", lambda image: _file(image, "AVIF", quality=80)),
}
