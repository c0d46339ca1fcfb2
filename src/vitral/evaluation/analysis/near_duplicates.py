"""`near_duplicates`: the same picture twice, stored anew, resized, mirrored or slightly cropped.

What is a near-duplicate `matching` decides. No model has a part in it, so that the figure is the same for
every model of a data set. Of two files with the same bytes `data/sources/doubles.py` tells.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vitral.data.batches import ImageKey, ImageLoading, collate
from vitral.data.split import Split, evenly
from vitral.data.workers import Loading, reader_count
from vitral.evaluation.analysis.matching import COPIED, NEAR, SIDE, Matches, find_matches, limit_for
from vitral.images.picture import decoded

__all__ = ["COPIED", "NEAR", "NearDuplicate", "NearDuplicates", "near_duplicates"]

# Of more images the search takes minutes.
MOST_TRAIN, MOST_HELD_OUT = 100_000, 20_000
_READ_TOGETHER = 512


@dataclass(frozen=True)
class NearDuplicate:
    """Two images that show the same picture."""

    row: int  # of the held-out images
    name: str
    other_row: int  # of the training images, or of the held-out ones where `within` is true
    other_name: str
    within: bool  # both are held out
    distance: float  # 1 - the correlation of their detail: 0 for the same, and at most `NEAR`
    mirrored: bool  # the one is the other's mirror image
    same_label: bool


@dataclass(frozen=True)
class NearDuplicates:
    """The pairs that were found, the nearest first."""

    pairs: tuple[NearDuplicate, ...]
    held_out: int  # images that were looked at
    train: int
    left_out: int  # images that were not looked at: too many of them, or damaged
    # Up to which distance two pictures count as the same: `NEAR`; `COPIED` where many pictures of this data
    # are alike, and a crop of one cannot be told from another one.
    limit: float
    akin: int  # held-out images that are within `NEAR` of another image, named above or not
    seconds: float

    @property
    def leaked(self) -> int:
        """Count the held-out images that have a near-duplicate among the training images."""
        return len({pair.row for pair in self.pairs if not pair.within})


def near_duplicates(
    held_out: Split,
    train: Split | None,
    *,
    workers: int | None = None,
    on_images: Callable[[int, int], None] = lambda *_: None,
) -> NearDuplicates:
    """Find pairs of the same picture among held-out images, and between them and training images.

    Copies are found that are stored anew, resized, brightened, made grey or mirrored, and most of those
    that lack a tenth of each side at most; not those that are turned or lack more.

    Args:
        held_out: at most 20,000 are looked at, evenly over their order.
        train: at most 100,000 likewise; None: only pairs of held-out images are looked for.
        workers: processes that load images; None: as many as the machine suits.
        on_images: told how many images are read, of how many.
    """
    begun = time.monotonic()
    total = len(held_out) + (len(train) if train else 0)
    asked = min(len(held_out), MOST_HELD_OUT), min(len(train), MOST_TRAIN) if train else 0
    ours = _read(held_out, asked[0], workers, lambda done: on_images(done, sum(asked)))
    among = find_matches(ours.pictures_NSS)
    pairs = _described((held_out, ours), (held_out, ours), among, within=True)
    looked_at = len(ours.rows)
    if train:
        theirs = _read(train, asked[1], workers, lambda done: on_images(asked[0] + done, sum(asked)))
        between = find_matches(ours.pictures_NSS, theirs.pictures_NSS)
        pairs += _described((held_out, ours), (train, theirs), between, within=False)
        looked_at += len(theirs.rows)
    seen = len(ours.rows)
    rows, distances = (np.array([getattr(pair, name) for pair in pairs]) for name in ("row", "distance"))
    limit, akin = limit_for(rows, distances, seen), len(np.unique(rows))
    pairs = sorted(
        (pair for pair in pairs if pair.distance <= limit),
        key=lambda pair: (pair.distance, pair.within, pair.row, pair.other_row),
    )
    seconds = time.monotonic() - begun
    return NearDuplicates(tuple(pairs), seen, looked_at - seen, total - looked_at, limit, akin, seconds)


class _Thumbnails(NamedTuple):
    """Small grey pictures, and the rows that they are of."""

    pictures_NSS: Tensor  # bytes
    rows: np.ndarray  # (n,)


def _read(split: Split, at_most: int, workers: int | None, on_images: Callable[[int], None]) -> _Thumbnails:
    keys = [ImageKey(0, row) for row in evenly(len(split), at_most).tolist()]
    together = [keys[first : first + _READ_TOGETHER] for first in range(0, len(keys), _READ_TOGETHER)]
    parts, rows, done = [torch.empty(0, SIDE, SIDE, dtype=torch.uint8)], [np.empty(0, dtype=np.int64)], 0
    loading = Loading(reader_count(len(keys), workers))
    for batch in loading.batches(ImageLoading(split, thumbnail, 0), together, collate):
        if len(batch.rows):
            parts.append(batch.images)
            rows.append(batch.rows)
        done += batch.asked
        on_images(done)
    return _Thumbnails(torch.cat(parts), np.concatenate(rows))


def thumbnail(source: Any) -> Tensor:
    """Give the whole picture, squashed: (S, S) bytes, grey.

    Raises:
        ImageError: if it cannot be read.
    """
    with decoded(source, at_least=2 * SIDE) as image:
        return grey_of(shrunk(image))


def shrunk(image: Image.Image) -> Image.Image:
    """Squash a decoded picture to `SIDE` pixels a side."""
    return image.resize((SIDE, SIDE), Image.Resampling.BICUBIC, reducing_gap=3)


def grey_of(small: Image.Image) -> Tensor:
    """Give what is compared: (S, S) bytes, grey."""
    return torch.from_numpy(np.array(small.convert("L")))


def _described(
    held_out: tuple[Split, _Thumbnails], others: tuple[Split, _Thumbnails], found: Matches, *, within: bool
) -> list[NearDuplicate]:
    (ours, of_ours), (theirs, of_theirs) = held_out, others
    rows, other_rows = of_ours.rows[found.rows].tolist(), of_theirs.rows[found.others].tolist()
    return [
        NearDuplicate(
            row,
            ours.names[row],
            other,
            theirs.names[other],
            within,
            distance,
            mirrored,
            bool(np.array_equal(ours.labels[row], theirs.labels[other])),
        )
        for row, other, distance, mirrored in zip(
            rows, other_rows, found.distances.tolist(), found.mirrored.tolist(), strict=True
        )
    ]
