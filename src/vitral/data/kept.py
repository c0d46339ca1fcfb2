"""`Kept`: decoded pictures in memory that worker processes share, so that later passes decode nothing.

A picture that is kept has the bits of one that is decoded anew: whether there is room for it changes how fast
batches come, and nothing else.
"""

import mmap
import multiprocessing
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from PIL import Image

from vitral.data.split import Images, Split
from vitral.images.picture import Undecoded, undecoded
from vitral.runtime.memory import available_bytes
from vitral.runtime.threads import local_size

# Of the memory that is free when a split is first read; the files themselves are in the rest, as the system's
# copies of what was read from disk.
SHARE_TO_TAKE = 0.3
_SPARE = 1.25  # times what the sizes of a few images say
_SCALES = (1, 2, 4, 8)


class Kept:
    """Arrays of bytes (H, W, 3) by row and scale, written once by whichever process comes first.

    The memory is taken as it is filled. Processes that are forked share it; those that are begun otherwise
    find nothing in it, and load what they need.

    Args:
        rows: of the split.
        room: bytes at most.
    """

    def __init__(self, rows: int, room: int) -> None:
        self._rows = rows
        # Of each scale: where its bytes end, 0 while they are not all there; height and width.
        self._places = _shared(rows * len(_SCALES) * 3, np.int64).reshape(rows, len(_SCALES), 3)
        self._sizes = _shared(
            rows, np.int64
        )  # of the whole pictures, as one number, which is never half read
        self._used = _shared(1, np.int64)
        self._pixels = _shared(room, np.uint8)
        self._lock = multiprocessing.Lock()

    def __reduce__(self) -> tuple:
        return Kept, (self._rows, 0)

    @property
    def nbytes(self) -> int:
        """What is taken."""
        return int(self._used[0])

    def whole(self, row: int) -> tuple[tuple[int, int], bool] | None:
        """(height, width) of the whole picture, and whether it can be divided; None if nothing is kept."""
        found = int(self._sizes[row])
        return ((found >> 33, found >> 1 & 0xFFFFFFFF), bool(found & 1)) if found else None

    def get(self, row: int, scale: int = 1) -> np.ndarray | None:
        """What was put there, not to be written into."""
        end, height, width = self._places[row, _SCALES.index(scale)].tolist()
        return self._pixels[end - 3 * height * width : end].reshape(height, width, 3) if end else None

    def put(self, row: int, pixels_HWC: np.ndarray, scale: int = 1) -> None:
        """Keep an array, if there is room, and if no other process is about to keep one.

        Nobody waits here: a process that is killed in the middle would never give the lock back.
        """
        place = self._places[row, _SCALES.index(scale)]
        if place[0] or not self._lock.acquire(block=False):
            return
        try:
            end = int(self._used[0]) + pixels_HWC.nbytes
            if place[0] or end > len(self._pixels):
                return
            self._pixels[end - pixels_HWC.nbytes : end] = pixels_HWC.reshape(-1)
            self._used[0] = end
            place[1:] = pixels_HWC.shape[:2]
            place[0] = end
        finally:
            self._lock.release()

    def put_picture(self, row: int, picture: Undecoded, scale: int, pixels_HWC: np.ndarray) -> None:
        """Keep a picture at a scale, and what it is as a whole."""
        self.put(row, pixels_HWC, scale)
        (height, width), divisible = picture.size, len(picture.scales) > 1
        self._sizes[row] = height << 33 | width << 1 | divisible


def _shared(count: int, kind: type) -> np.ndarray:
    """Zeros that forked processes share; without a file, so that no container's /dev/shm is too small."""
    size = max(count * np.dtype(kind).itemsize, 1)
    return np.frombuffer(mmap.mmap(-1, size), kind, count)


def keep(rows: int, bytes_in_all: float) -> Kept | None:
    """What keeps a split's images, where all fit; None where they do not.

    Args:
        rows: of the split.
        bytes_in_all: about what they take.
    """
    if bytes_in_all > SHARE_TO_TAKE * available_bytes() / local_size():
        return None
    try:
        return Kept(rows, int(_SPARE * bytes_in_all))
    except (OSError, ValueError):  # a system that promises no more memory than it has
        return None


def decoded_bytes(split: Split, most_reduced: int = 1) -> float:
    """About what the decoded pictures of a split take, by the sizes of a few.

    Args:
        split: the images.
        most_reduced: the largest scale that any is divided by; one that is divided may be kept at two scales.
    """
    pixels = float(split.typical_sizes.astype(float).prod(axis=1).mean())
    scales = 1.0 if most_reduced == 1 else (1 + 4) / most_reduced**2
    return 3 * pixels * scales * len(split)


class Pictures:
    """The images of a split as pictures that are decoded when their pixels are asked for.

    Args:
        images: encoded, or decoded.
        kept: where what was decoded is kept, if it is.
    """

    def __init__(self, images: Images, kept: Kept | None = None) -> None:
        self._images, self._kept = images, kept

    @contextmanager
    def opened(self, row: int) -> Iterator[Undecoded]:
        """A picture; an encoded one's file is not touched if all that is asked for is kept."""
        if self._kept is None:
            with undecoded(self._images[row]) as picture:
                yield picture
        elif (whole := self._kept.whole(row)) is not None:
            yield _KeptPicture(self._kept, self._images, row, whole)
        else:
            with undecoded(self._images[row]) as picture:
                yield _Keeping(self._kept, row, picture)


class _Keeping(Undecoded):
    """A picture that is kept as it is decoded."""

    def __init__(self, kept: Kept, row: int, picture: Undecoded) -> None:
        super().__init__(picture.size, picture.scales)
        self.kept, self.row, self.picture = kept, row, picture

    def _pixels(self, scale: int) -> np.ndarray:
        pixels_HWC = self.picture.pixels(scale)
        self.kept.put_picture(self.row, self.picture, scale, pixels_HWC)
        return pixels_HWC

    def _image(self, scale: int) -> Image.Image:
        return Image.fromarray(self._pixels(scale))


class _KeptPicture(Undecoded):
    """A picture that is kept at one scale at least."""

    def __init__(self, kept: Kept, images: Images, row: int, whole: tuple[tuple[int, int], bool]) -> None:
        size, divisible = whole
        super().__init__(size, _SCALES[::-1] if divisible else (1,))
        self.kept, self.images, self.row = kept, images, row

    def _pixels(self, scale: int) -> np.ndarray:
        if (pixels_HWC := self.kept.get(self.row, scale)) is not None:
            return pixels_HWC
        with undecoded(self.images[self.row]) as picture:
            return _Keeping(self.kept, self.row, picture).pixels(scale)

    def _image(self, scale: int) -> Image.Image:
        return Image.fromarray(self._pixels(scale))
