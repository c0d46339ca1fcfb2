"""How a picture is stored, where that may surprise: what other programs show is not what a model gets.

What Vitral makes of each is decided in `files` and `picture`; here it is told of a file that is opened.
"""

import struct
from pathlib import Path
from typing import Any

from PIL import Image

# What is found, and what is done about it.
SURPRISES = {
    "turned": (
        "stored lying, with a note in EXIF which way up they are: Vitral sets them upright, and a program "
        "that does not heed the note shows others"
    ),
    "profile": (
        "of another colour profile than sRGB: Vitral takes the numbers as they are, so that colours differ "
        "a little from those on a screen"
    ),
    "cmyk": "in the colours of print (CMYK): they become RGB without their profile",
    "deep": "of more than 8 bits: Vitral scales them to 8",
    "transparent": "transparent: Vitral lays them on white",
    "frames": "of several frames: Vitral takes the first",
    "suffix": "of another format than their names say: Vitral goes by the content; other programs may not",
}
_FORMATS = {
    ".jpg": "JPEG",
    ".jpeg": "JPEG",
    ".png": "PNG",
    ".gif": "GIF",
    ".bmp": "BMP",
    ".webp": "WEBP",
    ".tif": "TIFF",
    ".tiff": "TIFF",
    ".avif": "AVIF",
}
_ORIENTATION, _LYING = 0x0112, range(5, 9)  # EXIF 2.32
_TAGS = 128  # bytes of an ICC profile before the table of its tags (ICC.1:2022, 7.2)
_MOST_TAGS = 100


def format_of(image: Image.Image) -> str:
    """Name the format of an opened file; "" of a picture that no file holds."""
    return "JPEG" if image.format == "MPO" else image.format or ""


def upright_size(image: Image.Image) -> tuple[int, int]:
    """Give (height, width) of an opened file once it is upright."""
    sides = image.height, image.width
    return sides[::-1] if _orientation(image) in _LYING else sides


def surprises(image: Image.Image, name: str) -> dict[str, str]:
    """Tell what of `SURPRISES` an opened file is, each with a word about it.

    Args:
        image: whose header is read; of a transparent kind, its pixels are decoded.
        name: of the file, or "" where it has none.
    """
    found: dict[str, str] = {}
    if (orientation := _orientation(image)) in range(2, 9):
        found["turned"] = f"orientation {orientation}"
    profile = profile_name(image.info.get("icc_profile") or b"")
    if profile and "srgb" not in profile.lower() and image.mode in ("RGB", "RGBA", "P"):
        found["profile"] = profile
    if image.mode in ("CMYK", "YCCK"):
        found["cmyk"] = image.mode
    if image.mode.startswith(("I", "F")):
        found["deep"] = "floats" if image.mode == "F" else "16 bits or more"
    if _is_transparent(image):
        found["transparent"] = image.mode
    if image.format != "MPO" and (frames := getattr(image, "n_frames", 1)) > 1:
        found["frames"] = f"{frames:,} frames"
    stored, said = format_of(image), _FORMATS.get(Path(name).suffix.lower())
    if stored and said and stored != said:
        found["suffix"] = f"is {stored}"
    return found


def _orientation(image: Image.Image) -> Any:
    return image.getexif().get(_ORIENTATION, 1)


def _is_transparent(image: Image.Image) -> bool:
    """Whether some pixel is; screenshots have a channel for it, and every pixel of it is opaque."""
    if image.mode in ("RGBA", "LA"):
        least: Any = image.getchannel("A").getextrema()[0]
        return least < 255
    return image.has_transparency_data


def profile_name(profile: bytes) -> str:
    """Read what an ICC profile calls itself (its tag "desc"); "" for none, or one that is damaged."""
    try:
        count = min(struct.unpack_from(">I", profile, _TAGS)[0], _MOST_TAGS)
        for place in range(count):
            tag, start, _ = struct.unpack_from(">4sII", profile, _TAGS + 4 + 12 * place)
            if tag == b"desc":
                return _described(profile, start)
    except (struct.error, UnicodeDecodeError):
        pass
    return ""


def _described(profile: bytes, start: int) -> str:
    """The text of a tag of the type "desc" (version 2) or "mluc" (version 4)."""
    if profile[start : start + 4] == b"mluc":
        length, offset = struct.unpack_from(">II", profile, start + 20)
        text = profile[start + offset : start + offset + length].decode("utf-16-be")
    else:
        (length,) = struct.unpack_from(">I", profile, start + 8)
        text = profile[start + 12 : start + 12 + length].decode("ascii")
    return " ".join(text.replace("\0", " ").split())
