"""`near_duplicates`: the same picture twice, stored anew, resized, mirrored or slightly cropped.

What is a near-duplicate is decided here: two pictures whose detail, at 32 pixels a side, correlates by
0.75 and more once a crop or a mirroring of one is undone. No model has a part in it, so that the figure is
the same for every model of a data set. Of two files with the same bytes `data/sources/doubles.py` tells.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from vitral.data.batches import ImageKey, ImageLoading, collate
from vitral.data.split import Split, evenly
from vitral.data.workers import Loading, reader_count
from vitral.evaluation.analysis.alignment import align, likeness, zoomed
from vitral.images.picture import decoded

# Of 120 pairs of CIFAR-10 that were looked at, the 72 below 0.2 show one picture each; of the 48 from 0.2 to
# 0.25 five or so are two pictures that are much alike (docs/log.md, 2026-11-26).
NEAR = 0.25
# Digits, X-rays, frames of a film: where more than a tenth of the held-out images are so near to others, and
# to more than two each, only such pairs are named as files make that are stored anew or resized.
COPIED, _AKIN_SHARE, _LEAST_AKIN, _AKIN_TO = 0.03, 0.1, 20, 2
SIDE = 32
# Of more images the search takes minutes.
MOST_TRAIN, MOST_HELD_OUT = 100_000, 20_000
_READ_TOGETHER, _ROWS_TOGETHER, _PAIRS_TOGETHER = 512, 500, 4096
# A crop that leaves nine tenths of each side, or less, is looked for from this one on.
_CROP = 0.87
# By light and shade alone, at 8 x 8: the nearest of each view, and of all views the pairs to look at.
_COARSE, _NEAREST, _LOOKED_AT = 8, 2, 4
# Steps at half the size, the likeness there below which a pair is given up, and steps at the whole size.
_FIRST_STEPS, _PROMISING, _LAST_STEPS = 4, 0.45, 5


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
    pairs = _described(held_out, held_out, _pairs(ours, None), within=True)
    looked_at = len(ours.rows)
    if train:
        theirs = _read(train, asked[1], workers, lambda done: on_images(asked[0] + done, sum(asked)))
        pairs += _described(held_out, train, _pairs(ours, theirs), within=False)
        looked_at += len(theirs.rows)
    seen = len(ours.rows)
    limit, akin = _limit(pairs, seen), len({pair.row for pair in pairs})
    pairs = sorted(
        (pair for pair in pairs if pair.distance <= limit),
        key=lambda pair: (pair.distance, pair.within, pair.row, pair.other_row),
    )
    seconds = time.monotonic() - begun
    return NearDuplicates(tuple(pairs), seen, looked_at - seen, total - looked_at, limit, akin, seconds)


def _limit(pairs: list[NearDuplicate], seen: int) -> float:
    others = [pair.row for pair in pairs if pair.distance > COPIED]
    akin = len(set(others))
    many = akin > max(_AKIN_SHARE * seen, _LEAST_AKIN) and len(others) > _AKIN_TO * akin
    return COPIED if many else NEAR


class _Thumbnails(NamedTuple):
    """Small grey pictures, and the rows that they are of."""

    pictures_NSS: Tensor  # bytes
    rows: np.ndarray  # (n,)


class _Pairs(NamedTuple):
    """P pairs that may show the same picture."""

    rows: Tensor  # (P,) of the one
    others: Tensor  # (P,) of the other
    mirrored: Tensor  # (P,)
    placements_P4: Tensor


def _read(split: Split, at_most: int, workers: int | None, on_images: Callable[[int], None]) -> _Thumbnails:
    keys = [ImageKey(0, row) for row in evenly(len(split), at_most).tolist()]
    together = [keys[first : first + _READ_TOGETHER] for first in range(0, len(keys), _READ_TOGETHER)]
    parts, rows, done = [torch.empty(0, SIDE, SIDE, dtype=torch.uint8)], [np.empty(0, dtype=np.int64)], 0
    loading = Loading(reader_count(len(keys), workers))
    for batch in loading.batches(ImageLoading(split, _thumbnail, 0), together, collate):
        if len(batch.rows):
            parts.append(batch.images)
            rows.append(batch.rows)
        done += batch.asked
        on_images(done)
    return _Thumbnails(torch.cat(parts), np.concatenate(rows))


def _thumbnail(source: Any) -> Tensor:
    """The whole picture, squashed: (S, S) bytes, grey."""
    with decoded(source, at_least=2 * SIDE) as image:
        small = image.resize((SIDE, SIDE), Image.Resampling.BICUBIC, reducing_gap=3)
    return torch.from_numpy(np.array(small.convert("L")))


def _described(held_out: Split, others: Split, found: list[tuple], *, within: bool) -> list[NearDuplicate]:
    return [
        NearDuplicate(
            row,
            held_out.names[row],
            other,
            others.names[other],
            within,
            distance,
            mirrored,
            bool(np.array_equal(held_out.labels[row], others.labels[other])),
        )
        for row, other, distance, mirrored in found
    ]


def _pairs(ours: _Thumbnails, theirs: _Thumbnails | None) -> list[tuple[int, int, float, bool]]:
    """Rows, distance and mirroring of the pairs that are near; among `ours` where there are no others."""
    others = ours if theirs is None else theirs
    if len(ours.rows) < 1 + (theirs is None) or not len(others.rows):
        return []
    candidates = _candidates(ours.pictures_NSS, others.pictures_NSS, among_themselves=theirs is None)
    nearest: dict[tuple[int, int], tuple[float, bool]] = {}
    for first in range(0, len(candidates.rows), _PAIRS_TOGETHER):
        part = _Pairs(*(column[first : first + _PAIRS_TOGETHER] for column in candidates))
        likenesses_P = _likenesses(ours.pictures_NSS, others.pictures_NSS, part)
        for place in torch.nonzero(likenesses_P >= 1 - NEAR)[:, 0].tolist():
            pair = int(ours.rows[part.rows[place]]), int(others.rows[part.others[place]])
            pair = (min(pair), max(pair)) if theirs is None else pair
            found = max(1 - float(likenesses_P[place]), 0.0), bool(part.mirrored[place])
            nearest[pair] = min(nearest.get(pair, found), found)
    return [(*pair, *found) for pair, found in nearest.items()]


def _candidates(ours_NSS: Tensor, others_MSS: Tensor, *, among_themselves: bool) -> _Pairs:
    """Of each picture the few others that are nearest in light and shade, by any view."""
    parts = [part_NSS.float() for part_NSS in others_MSS.split(_PAIRS_TOGETHER)]
    whole_MD = torch.cat([_shades(part_NSS) for part_NSS in parts])
    cropped_MD = torch.cat([_shades(zoomed(part_NSS, _CROP)) for part_NSS in parts])
    found = []
    for first in range(0, len(ours_NSS), _ROWS_TOGETHER):
        part_NSS = ours_NSS[first : first + _ROWS_TOGETHER].float()
        views = []
        for mirrored in (False, True):
            seen_NSS = part_NSS.flip(-1) if mirrored else part_NSS
            whole_ND = _shades(seen_NSS)
            views += [(whole_ND, whole_MD, mirrored, 1.0), (whole_ND, cropped_MD, mirrored, _CROP)]
            views += [(_shades(zoomed(seen_NSS, _CROP)), whole_MD, mirrored, 1 / _CROP)]
        rows = torch.arange(first, first + len(part_NSS))
        found.append(_nearest_by_views(rows, views, among_themselves=among_themselves))
    return _Pairs(*(torch.cat(columns) for columns in zip(*found, strict=True)))


def _nearest_by_views(
    rows: Tensor, views: list[tuple[Tensor, Tensor, bool, float]], *, among_themselves: bool
) -> _Pairs:
    columns = []
    for ours_ND, others_MD, mirrored, scale in views:
        alike_NM = ours_ND @ others_MD.T
        if among_themselves:
            alike_NM[torch.arange(len(rows)), rows] = -2.0
        alike_NK, others_NK = alike_NM.topk(min(_NEAREST, len(others_MD)), dim=1)
        facts = torch.tensor([float(mirrored), scale]).expand(*others_NK.shape, 2)
        columns.append(torch.cat([alike_NK[..., None], others_NK[..., None].double(), facts], dim=2))
    table_NV4 = torch.cat(columns, dim=1)
    order_NV = table_NV4[..., 0].argsort(dim=1, descending=True, stable=True)[:, :_LOOKED_AT]
    chosen_P4 = table_NV4.gather(1, order_NV[..., None].expand(-1, -1, 4)).flatten(0, 1)
    of_rows = rows.repeat_interleave(order_NV.shape[1])
    scale_P, zero_P = chosen_P4[:, 3].float(), torch.zeros(len(of_rows))
    placements_P4 = torch.stack([scale_P, scale_P, zero_P, zero_P], dim=1)
    kept = chosen_P4[:, 0] > -2.0
    pairs = _Pairs(of_rows, chosen_P4[:, 1].long(), chosen_P4[:, 2] > 0, placements_P4)
    return _Pairs(*(column[kept] for column in pairs))


def _shades(pictures_NSS: Tensor) -> Tensor:
    """Light and shade at 8 x 8, centred and of unit length, so that products are correlations."""
    coarse_ND = F.adaptive_avg_pool2d(pictures_NSS[:, None], _COARSE).flatten(1)
    return F.normalize(coarse_ND - coarse_ND.mean(1, keepdim=True), dim=1)


def _likenesses(ours_NSS: Tensor, others_MSS: Tensor, pairs: _Pairs) -> Tensor:
    """Of each pair once it is aligned, first at half the size; -1 where that is given up."""
    first_PSS, second_PSS = ours_NSS[pairs.rows].float(), others_MSS[pairs.others].float()
    first_PSS = torch.where(pairs.mirrored[:, None, None], first_PSS.flip(-1), first_PSS)
    first_PHH, second_PHH = _halved(first_PSS), _halved(second_PSS)
    placements_P4 = align(first_PHH, second_PHH, pairs.placements_P4, _FIRST_STEPS)
    kept = likeness(first_PHH, second_PHH, placements_P4) >= _PROMISING
    result_P = torch.full((len(kept),), -1.0)
    if bool(kept.any()):
        first_KSS, second_KSS = first_PSS[kept], second_PSS[kept]
        placements_K4 = align(first_KSS, second_KSS, placements_P4[kept], _LAST_STEPS)
        result_P[kept] = likeness(first_KSS, second_KSS, placements_K4)
    return result_P


def _halved(pictures_PSS: Tensor) -> Tensor:
    return F.avg_pool2d(pictures_PSS[:, None], 2)[:, 0]
