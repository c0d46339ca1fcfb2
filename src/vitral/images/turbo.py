"""JPEG's pixels by simplejpeg where it is installed: Pillow's to the bit, sooner, and at once as an array.

Both are libjpeg-turbo; what Pillow takes longer for is its own layout of four bytes a pixel, and the copy out
of it (docs/log.md, 2026-11-27). What is not plain is left to Pillow, and what is damaged, which it names.
"""

import io

import numpy as np
from PIL import Image

from vitral.images.files import is_upright
from vitral.runtime.extras import is_installed

_SMALLEST_SIDE = 64  # below, other scales than the one that is meant give the same size


def turbo_pixels(image: Image.Image, scale: int) -> np.ndarray | None:
    """Decode a JPEG whose header is read, each side divided by `scale`; None where Pillow is to do it."""
    plain = image.format == "JPEG" and image.mode == "RGB" and min(image.size) >= _SMALLEST_SIDE
    content = getattr(image, "fp", None)
    if not (plain and isinstance(content, io.BytesIO) and is_installed("simplejpeg") and is_upright(image)):
        return None
    import simplejpeg

    wanted = -(-image.height // scale), -(-image.width // scale)
    try:
        pixels_HWC = simplejpeg.decode_jpeg(
            content.getbuffer(), "RGB", min_height=wanted[0], min_width=wanted[1], min_factor=1
        )
    except ValueError:  # at the least doubt, warnings too
        return None
    return pixels_HWC if pixels_HWC.shape == (*wanted, 3) else None
