"""Which files count as images: their names and formats, what they may cost, which way up they are.

Whoever opens an encoded picture does so by `opened`, which reads its header alone and refuses what is no
regular file, of no known format, or worth more memory or time than any photograph. What a picture is once
it is decoded (depth, colour, transparency), `picture` decides.
"""

import importlib.util
import io
import os
import re
import stat
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

from PIL import Image, UnidentifiedImageError

from vitral.images import libtiff
from vitral.runtime.errors import ImageError
from vitral.runtime.extras import is_installed
from vitral.runtime.process import return_freed_memory

# The formats that people keep photographs in. Of Pillow's others some start programs (EPS, "gs") or are
# read by code that few have tried.
_COMMON = ("JPEG", "PNG", "GIF", "BMP", "PPM")  # known to Pillow from its start
_PLUGINS = {
    "TIFF": "TiffImagePlugin",
    "WEBP": "WebPImagePlugin",
    "AVIF": "AvifImagePlugin",
    "JPEG2000": "Jpeg2KImagePlugin",
}
_NAMES = "JPEG, PNG, GIF, WebP, TIFF, BMP, PPM, AVIF, JPEG 2000"
# By which a file in a folder is known; of a file without a suffix the content is looked at.
_SUFFIXES = frozenset(
    f".{name}"
    for names in (
        ("jpg", "jpeg", "jpe", "jfif", "jif", "mpo", "png", "apng", "gif", "webp", "bmp", "tif", "tiff"),
        ("ppm", "pgm", "pbm", "pnm", "avif", "avifs", "jp2", "j2k", "jpx"),
    )
    for name in names
)
# That are tried, in this order, where a table names pictures without.
USUAL_SUFFIXES = (
    ".jpg", ".jpeg", ".png", ".JPG", ".JPEG", ".PNG", ".webp", ".tif", ".tiff", ".bmp", ".gif", ".heic",
)  # fmt: skip
_HEIF_SUFFIXES = frozenset([".heic", ".heif", ".hif"])
_HEIF_BRANDS = frozenset([b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"])
# What systems and archives leave behind, beside all that begins with a dot.
_LEFT_BEHIND = frozenset(["__macosx", "thumbs.db", "desktop.ini", "@eadir", "lost+found", "$recycle.bin"])
IMAGE, HEIC = "image", "HEIC"
HEIF_ADVICE = "install pillow-heif: pip install 'vitral[heif]'"

# What decoding takes at its peak, in all threads of a process together: enough for the largest picture that
# Pillow opens, 179 million pixels, of grey or colour, and not for eight copies of it.
_ROOM_BYTES = 900_000_000
_LARGE_BYTES = 100_000_000  # of one picture
_READ_AS_A_WHOLE = 32_000_000  # bytes of a file at most
# Bytes a pixel that a format's decoder takes beside the picture (docs/log.md, 2026-11-26).
_DECODER_BYTES = {"WEBP": 14, "AVIF": 8, "JPEG2000": 16, "HEIF": 8, "TIFF": 4}
# The best coders spend a bit on ten pixels of a photograph; a bomb of 0.3 MB is 169 million of one colour.
_ALWAYS_WORTH_PIXELS, _MOST_PIXELS_A_BYTE = 50_000_000, 100
# Of a JPEG that is stored in several scans: each goes over all pixels. Libraries write some ten of them.
_MOST_SCANNED_PIXELS = 2_000_000_000
_ORIENTATION = 0x0112  # EXIF 2.32


# --- Which files -----------------------------------------------------------------------------------


def heif_is_there() -> bool:
    return is_installed("pillow_heif")


def is_overlooked(name: str) -> bool:
    """Whether a file or folder is not even counted: it is hidden, or a system or an archive left it there."""
    return name.startswith(".") or name.lower() in _LEFT_BEHIND


def has_image_suffix(name: str) -> bool:
    """Whether a file's name ends as those of pictures do."""
    return os.path.splitext(name)[1].lower() in _SUFFIXES | _HEIF_SUFFIXES


def kind_of_content(file: str) -> str:
    """What a regular file of a folder counts as, by its suffix, and without one by its first bytes.

    Returns:
        `IMAGE`; `HEIC`, an image that needs a package which is not installed; or what it is instead, as a
        message names it: another suffix, or "without a suffix".
    """
    suffix = Path(file).suffix.lower()
    if suffix in _SUFFIXES:
        return IMAGE
    if suffix in _HEIF_SUFFIXES:
        return IMAGE if heif_is_there() else HEIC
    if suffix:
        return suffix
    return IMAGE if _begins_like_an_image(file) else "without a suffix"


def _begins_like_an_image(file: str) -> bool:
    """Whether the first bytes are those of a known format."""
    try:
        with Path(file).open("rb") as opened_file:
            prefix = opened_file.read(16)
    except OSError:
        return False
    return _is_heif(prefix) or any(accept and accept(prefix) is True for accept in _accepting())


def _accepting() -> list[Callable | None]:
    return [Image.OPEN[name][1] for name in (*_formats(_COMMON), *_formats(tuple(_PLUGINS)))]


def _is_heif(prefix: bytes) -> bool:
    return prefix[4:8] == b"ftyp" and prefix[8:12] in _HEIF_BRANDS


@cache
def _formats(wanted: tuple[str, ...]) -> tuple[str, ...]:
    """Those of Pillow's formats that this build of it knows."""
    Image.preinit()
    for name in wanted:
        if name in _PLUGINS:
            importlib.import_module(f"PIL.{_PLUGINS[name]}")
    return tuple(name for name in wanted if name in Image.OPEN)


def refuse_irregular(file: str | os.PathLike) -> os.stat_result:
    """To open a named pipe waits for its writer, and to open a device may do anything.

    Returns:
        what the system says of it.

    Raises:
        ImageError: unless there is a regular file.
    """
    try:
        found = os.stat(file)
    except FileNotFoundError:
        raise ImageError(f"there is no file {file}") from None
    except (OSError, ValueError) as error:
        raise ImageError(why_not_read(error)) from error
    if not stat.S_ISREG(found.st_mode):
        raise ImageError(f"is {kind_of_file(found.st_mode)}; only regular files are read")
    return found


def kind_of_file(mode: int) -> str:
    """What `st_mode` says that is no regular file."""
    kinds = {
        stat.S_IFDIR: "a folder",
        stat.S_IFIFO: "a named pipe",
        stat.S_IFSOCK: "a socket",
        stat.S_IFCHR: "a device",
        stat.S_IFBLK: "a device",
    }
    return kinds.get(stat.S_IFMT(mode), "no regular file")


def why_not_read(error: Exception) -> str:
    """The reason that a system gives for not opening a file."""
    if isinstance(error, PermissionError):
        return "may not be read: permission is missing"
    return f"cannot be opened: {error.strerror or error}" if isinstance(error, OSError) else str(error)


def why_not_list(error: OSError) -> str:
    """The reason that a system gives for not listing a folder."""
    if isinstance(error, PermissionError):
        return "may not be listed: permission is missing"
    return f"cannot be listed: {error.strerror or error}"


# --- Opening ---------------------------------------------------------------------------------------


@contextmanager
def opened(source: str | os.PathLike | bytes) -> Iterator[Image.Image]:
    """An encoded picture with its header read and no pixel decoded; closed at the end.

    Raises:
        ImageError: if it is no regular file or of no known format. Pillow raises many kinds on damaged ones.
    """
    if not isinstance(source, bytes):
        refuse_irregular(source)
    with _without_warnings(), _identified(source) as image:
        yield image


@contextmanager
def decodable(source: str | os.PathLike | bytes) -> Iterator[Image.Image]:
    """As `opened`, for whoever decodes the pixels; it waits while other threads' pictures take too much.

    Raises:
        ImageError: also if it takes more memory or time than any photograph.
    """
    content, stored = _read_if_small(source)
    with opened(content) as image:
        _refuse_few_bytes(image, stored)
        with _room.taken(_bytes_if_worth_it(image)):
            yield image


def _read_if_small(source: str | os.PathLike | bytes) -> tuple[str | os.PathLike | bytes, int]:
    """A file's content, where it is no larger than photographs are, and its size: read as a whole.

    Pillow reads it in pieces, and each takes as long as to read half of it.
    """
    if isinstance(source, bytes):
        return source, len(source)
    size = refuse_irregular(source).st_size
    if size > _READ_AS_A_WHOLE:
        return source, size
    with open(source, "rb", buffering=0) as file:
        return file.readall(), size


def _identified(source: Any) -> Image.Image:
    for formats in (_COMMON, tuple(_PLUGINS)):
        with suppress(UnidentifiedImageError):
            return Image.open(_readable(source), formats=_formats(formats))
    with io.BytesIO(source) if isinstance(source, bytes) else Path(source).open("rb") as file:
        prefix = file.read(16)
    if not _is_heif(prefix):
        raise ImageError(f"not an image, or of a format that Vitral does not read ({_NAMES})")
    if not heif_is_there():
        raise ImageError(f"is a HEIC image; to open it, {HEIF_ADVICE}")
    from pillow_heif import HeifImageFile  # pyrefly: ignore[missing-import]

    # Its class alone: registered with Pillow, the format would be known to all of the process.
    return HeifImageFile(_readable(source))


def _readable(source: Any) -> Any:
    return io.BytesIO(source) if isinstance(source, bytes) else source


def upright(image: Image.Image) -> Image.Image:
    """The picture as its orientation in EXIF or XMP says, where that can be read; else as it is."""
    method = _turn(image)
    return image if method is None else image.transpose(method)


def is_upright(image: Image.Image) -> bool:
    """Tell whether a picture lies as it is meant."""
    return _turn(image) is None


def upright_size(image: Image.Image) -> tuple[int, int]:
    """(height, width) of a picture as `upright` would give it; of one whose pixels are not decoded yet."""
    sideways = _turn(image) in _SIDEWAYS
    return (image.width, image.height) if sideways else (image.height, image.width)


def _turn(image: Image.Image) -> Image.Transpose | None:
    if image.format == "JPEG" and image.info.keys().isdisjoint(_HOLDS_ORIENTATION):
        return None  # to look takes Pillow as long as to read the header
    try:
        return _TURNS.get(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # of damaged metadata Pillow raises many kinds, and the pixels may be sound
        return None


_TURNS: dict[Any, Image.Transpose] = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_HOLDS_ORIENTATION = frozenset(["exif", "xmp", "Raw profile type exif", "XML:com.adobe.xmp"])
_SIDEWAYS = (
    Image.Transpose.TRANSPOSE,
    Image.Transpose.ROTATE_270,
    Image.Transpose.TRANSVERSE,
    Image.Transpose.ROTATE_90,
)


# --- What it may cost ------------------------------------------------------------------------------


def _refuse_few_bytes(image: Image.Image, stored: int) -> None:
    """Raises ImageError for a large picture that is next to nothing but its size."""
    pixels = image.width * image.height
    if pixels > _ALWAYS_WORTH_PIXELS and stored * _MOST_PIXELS_A_BYTE < pixels:
        raise ImageError(
            f"is too large for what is in it: {image.width:,}x{image.height:,} pixels in {stored:,} bytes; "
            "make it smaller"
        )


def _bytes_if_worth_it(image: Image.Image) -> int:
    """About what decoding an opened picture to 8-bit RGB takes at its peak.

    Raises ImageError where a header promises more work than any photograph is.
    """
    scans = _count_scans(image) if image.format in ("JPEG", "MPO") else 1
    stored = {"1": 1, "L": 1, "P": 1, "I;16": 2}.get(image.mode, 4)
    result = 0 if image.mode == "RGB" and "transparency" not in image.info else 4
    # Of several scans libjpeg keeps every coefficient.
    decoder = 2 * len(image.getbands()) if scans > 1 else _DECODER_BYTES.get(image.format or "", 0)
    turned = stored if image.format != "PNG" and _turn(image) else 0
    pixels = image.width * image.height
    wanted, size = pixels * (stored + turned + result + decoder), f"{image.width:,}x{image.height:,} pixels"
    if wanted > _ROOM_BYTES:
        raise ImageError(
            f"is too large: to decode {size} of {image.format} takes some {wanted / 1e9:.1f} GB, more than "
            f"{_ROOM_BYTES / 1e9:.1f}; make it smaller"
        )
    if scans * pixels > _MOST_SCANNED_PIXELS:
        raise ImageError(f"is too slow to decode: {size} in {scans:,} scans; save it anew")
    return wanted


def _count_scans(image: Any) -> int:
    """The scans of a JPEG whose header is read; the rest is looked at only where there are several."""
    file = image.fp
    at = file.tell()
    # Pillow stands behind the header of the first scan: its length and how many components it has, then two
    # bytes for each and three more (ITU-T T.81, B.2.3).
    length = 6 + 2 * image.layers
    file.seek(max(at - length, 0))
    header = file.read(3)
    if (
        image.format == "JPEG"
        and not image.info.get("progressive")
        and header == bytes([0, length, image.layers])
    ):
        scans = 1
    else:
        file.seek(0)
        scans = sum(marker == _SCAN for marker in _markers(file.read()))
    file.seek(at)
    return scans


# A byte FF and one that is no data (00), no restart (D0 to D7) and no filler (FF): a marker of JPEG.
_MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")
_END, _SCAN, _WITHOUT_LENGTH = 0xD9, 0xDA, (0x01, 0xD8)


def _markers(content: bytes) -> Iterator[int]:
    """The markers of a JPEG until its end."""
    place = 0
    while found := _MARKER.search(content, place):
        marker, place = content[found.start() + 1], found.end()
        if marker == _END:
            return
        yield marker
        if marker not in _WITHOUT_LENGTH:
            place += int.from_bytes(content[place : place + 2], "big")


class _Room:
    """Lets pictures be decoded while all together fit; others wait for theirs."""

    def __init__(self, total: int) -> None:
        self._total, self._taken, self._changed = total, 0, threading.Condition()

    @contextmanager
    def taken(self, wanted: int) -> Iterator[None]:
        with self._changed:
            self._changed.wait_for(lambda: not self._taken or self._taken + wanted <= self._total)
            self._taken += wanted
        if wanted > _LARGE_BYTES:
            # Else each thread's part of the heap keeps what an earlier picture took.
            return_freed_memory()
        try:
            yield
        finally:
            with self._changed:
                self._taken -= wanted
                self._changed.notify_all()


_room = _Room(_ROOM_BYTES)


def _new_room() -> None:
    global _room
    _room = _Room(_ROOM_BYTES)


if hasattr(os, "register_at_fork"):  # what threads of the parent hold is not freed in a child
    os.register_at_fork(after_in_child=_new_room)


# --- Pillow's warnings, and libtiff's --------------------------------------------------------------

_lock = threading.Lock()
_inside = 0
_handlers: tuple[int | None, ...] = ()


@contextmanager
def _without_warnings() -> Iterator[None]:
    """Of damaged metadata and the like, in pictures that can be read all the same.

    `warnings.catch_warnings` in several threads leaves what one of them found; here the last one out takes
    away the one filter that the first one in has put.
    """
    global _inside, _handlers
    with _lock:
        _inside += 1
        if _inside == 1:
            warnings.filters.insert(0, _FILTER)  # type: ignore[attr-defined]
            _handlers = libtiff.silence()
    try:
        yield
    finally:
        with _lock:
            _inside -= 1
            if not _inside:
                libtiff.restore(_handlers)
                if _FILTER in warnings.filters:
                    warnings.filters.remove(_FILTER)  # type: ignore[attr-defined]


_FILTER = ("ignore", None, Warning, re.compile(r"PIL\."), 0)
