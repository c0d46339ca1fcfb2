"""One look at every image: can it be read, how is it stored, and a small grey picture of it."""

import hashlib
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageChops
from torch import Tensor
from torch.utils.data import Dataset

from vitral.data.ring import Memory
from vitral.data.split import Split
from vitral.data.workers import Loading, reader_count
from vitral.evaluation.analysis.matching import SIDE
from vitral.evaluation.analysis.near_duplicates import grey_of, shrunk
from vitral.images.files import opened, refuse_irregular, why_not_read
from vitral.images.picture import decoded
from vitral.images.stored import format_of, surprises, upright_size
from vitral.runtime.errors import ImageError

_TOGETHER = 256
_DIGEST_BYTES = 16
_COLOURLESS = 4  # grey levels between channels; JPEG rounds


class Seen(NamedTuple):
    """What one look at an image showed."""

    digest: bytes = b""  # of its bytes; b"" if they could not be read
    size: tuple[int, int] = (0, 0)  # (height, width), upright
    stored: str = ""  # its format; "" where no file holds it
    surprises: tuple[tuple[str, str], ...] = ()  # as `images/stored.py` tells them
    spread: float = (
        0.0  # standard deviation of the small picture, the largest of its channels, in grey levels
    )
    grey: bool = False  # whether no pixel of the small picture has a colour
    damage: str = ""  # why it cannot be read; "": it can


@dataclass(frozen=True)
class Looks:
    """What was seen of n images; their rows are those of the split."""

    seen: list[Seen]
    pictures_NSS: Tensor  # bytes; zeros where an image is damaged

    @property
    def sound(self) -> np.ndarray:
        """Whether each image can be read, (n,)."""
        return np.array([not seen.damage for seen in self.seen], dtype=bool)

    @property
    def sizes(self) -> np.ndarray:
        """(height, width) of each, (n, 2); zeros where an image is damaged."""
        return np.array([seen.size for seen in self.seen], dtype=np.int64).reshape(-1, 2)


def look_at(
    split: Split,
    *,
    workers: int | None = None,
    on_images: Callable[[int, int], None] = lambda *_: None,
    warn: Callable[[str], None] = lambda _: None,
) -> Looks:
    """Look at every image of a split once.

    Args:
        split: the images.
        workers: processes that read them; None: as many as the machine suits.
        on_images: told how many are done, of how many.
        warn: told when worker processes cannot go on.
    """
    count = len(split)
    pictures_NSS, seen, done = torch.zeros(count, SIDE, SIDE, dtype=torch.uint8), [], 0
    together = (range(first, min(first + _TOGETHER, count)) for first in range(0, count, _TOGETHER))
    loading = Loading(reader_count(count, workers), warn)
    for batch in loading.batches(_Looking(split), map(list, together), _collated):
        pictures_NSS[done : done + len(batch.seen)] = batch.pictures_BSS
        seen += batch.seen
        done += len(batch.seen)
        on_images(done, count)
    return Looks(seen, pictures_NSS)


class _Looking(Dataset):
    """Looks at an image by its row."""

    def __init__(self, split: Split) -> None:
        self.split = split

    def __getitem__(self, index: int) -> tuple[Seen, Tensor]:
        try:
            image = self.split.images[index]
            if isinstance(image, Image.Image):
                return _decoded(image, Seen(_digest(image.tobytes())))
            content = content_of(image)
            name = image.name if isinstance(image, Path) else ""
            seen, small_SS = _decoded(content, Seen(_digest(content)))
            return _stored(content, name, seen), small_SS
        except ImageError as error:
            return Seen(damage=str(error)), torch.zeros(SIDE, SIDE, dtype=torch.uint8)


def _digest(content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=_DIGEST_BYTES).digest()


def content_of(image: Path | bytes) -> bytes:
    """Give the bytes of an encoded image, read once for all that is asked of them.

    Raises:
        ImageError: if they cannot be read.
    """
    if isinstance(image, bytes):
        return image
    refuse_irregular(image)
    try:
        return image.read_bytes()
    except OSError as error:
        raise ImageError(why_not_read(error)) from error


def _decoded(source: Any, seen: Seen) -> tuple[Seen, Tensor]:
    """What the pixels say, and the small grey picture.

    Raises:
        ImageError: if it cannot be read.
    """
    with decoded(source, at_least=2 * SIDE) as image:
        size, small = (image.height, image.width), shrunk(image)
    red, green, blue = small.split()
    extrema: Any = small.getextrema()
    differences: Any = [ImageChops.difference(one, green).getextrema()[1] for one in (red, blue)]
    spread, grey = max(high - low for low, high in extrema), max(differences) <= _COLOURLESS
    return seen._replace(size=size, spread=spread, grey=grey), grey_of(small)


def _stored(content: bytes, name: str, seen: Seen) -> Seen:
    """What the header of a sound image says.

    Of damaged metadata Pillow raises many kinds; what was read before is kept.
    """
    with suppress(Exception), opened(content) as image:
        seen = seen._replace(stored=format_of(image), size=(image.height, image.width))
        seen = seen._replace(size=upright_size(image), surprises=tuple(surprises(image, name).items()))
    return seen


@dataclass
class _Batch:
    """Of B images, for the way from a worker process."""

    seen: list[Seen]
    pictures_BSS: Tensor
    nbytes: int = field(init=False)

    def __post_init__(self) -> None:
        self.nbytes = self.pictures_BSS.nbytes

    def share_memory(self) -> "_Batch":
        self.pictures_BSS = self.pictures_BSS.share_memory_()
        return self


def _collated(looked: Iterable[tuple[Seen, Tensor]], count: int, memory: Memory) -> _Batch:  # noqa: ARG001
    seen, pictures = zip(*looked, strict=True)
    return _Batch(list(seen), torch.stack(pictures))
