"""Which small grey pictures show the same picture: a few pairs are proposed, and each of them is verified.

What is a near-duplicate is decided here: two pictures whose detail, at 32 pixels a side, correlates by
0.75 and more once a crop or a mirroring of one is undone (`alignment`). Proposed are, for each picture, the
few others that are nearest in light and shade, whole, cropped or mirrored; the features of a model may
propose more of them, and decide nothing.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from vitral.evaluation.analysis.alignment import align, likeness, zoomed
from vitral.evaluation.analysis.nearest import Cells

SIDE = 32  # pixels
# Of 120 pairs of CIFAR-10 that were looked at, the 72 below 0.2 show one picture each; of the 48 from 0.2 to
# 0.25 five or so are two pictures that are much alike (docs/log.md, 2026-11-26).
NEAR = 0.25
# Digits, X-rays, frames of a film: where more than a tenth of the images are so near to others, and to more
# than two each, only such pairs are named as files make that are stored anew or resized.
COPIED, _AKIN_SHARE, _LEAST_AKIN, _AKIN_TO = 0.03, 0.1, 20, 2
# A crop that leaves nine tenths of each side, or less, is looked for from this one on.
_CROP = 0.87
# By light and shade alone, at 8 x 8: the nearest of each view, and of all views the pairs to look at.
_COARSE, _NEAREST, _LOOKED_AT = 8, 2, 4
# Steps at half the size, the likeness there below which a pair is given up, and steps at the whole size.
_FIRST_STEPS, _PROMISING, _LAST_STEPS = 4, 0.45, 5
_PICTURES_TOGETHER, _PAIRS_TOGETHER = 4096, 4096


class Matches(NamedTuple):
    """P pairs that show the same picture, by rows of what was given."""

    rows: np.ndarray  # (P,) of the one
    others: np.ndarray  # (P,) of the other
    distances: np.ndarray  # (P,) 1 - the correlation of their detail: 0 for the same, and at most `NEAR`
    mirrored: np.ndarray  # (P,) whether the one is the other's mirror image

    def within(self, limit: float) -> "Matches":
        """Take those that are at most so far from each other."""
        return Matches(*(column[self.distances <= limit] for column in self))


class _Pairs(NamedTuple):
    """P pairs that may show the same picture."""

    rows: Tensor  # (P,) of the one
    others: Tensor  # (P,) of the other
    mirrored: Tensor  # (P,)
    placements_P4: Tensor

    def part(self, places: Tensor | slice) -> "_Pairs":
        return _Pairs(*(column[places] for column in self))


def find_matches(
    ours_NSS: Tensor,
    others_MSS: Tensor | None = None,
    *,
    also: tuple[Tensor, Tensor] | None = None,
    on_pairs: Callable[[int, int], None] = lambda *_: None,
) -> Matches:
    """Find the pairs that are at most `NEAR` from each other; each is given once.

    Args:
        ours_NSS: pictures, bytes, `SIDE` pixels a side.
        others_MSS: those to compare them with; None: with one another.
        also: rows of pairs (P,), (P,) to verify beside those proposed here.
        on_pairs: told how many pairs are verified, of how many.
    """
    among = others_MSS is None
    others_MSS = ours_NSS if others_MSS is None else others_MSS
    if len(ours_NSS) < 1 + among or not len(others_MSS):
        return Matches(*(np.empty(0, kind) for kind in (np.int64, np.int64, float, bool)))
    pairs = _proposed(ours_NSS, others_MSS, among_themselves=among)
    if also is not None and len(also[0]):
        pairs = _Pairs(*(torch.cat(columns) for columns in zip(pairs, _both_ways(*also), strict=True)))
    nearest: dict[tuple[int, int], tuple[float, bool]] = {}
    for first in range(0, len(pairs.rows), _PAIRS_TOGETHER):
        part = pairs.part(slice(first, first + _PAIRS_TOGETHER))
        likenesses_P = _likenesses(ours_NSS, others_MSS, part)
        for place in torch.nonzero(likenesses_P >= 1 - NEAR)[:, 0].tolist():
            pair = int(part.rows[place]), int(part.others[place])
            pair = (min(pair), max(pair)) if among else pair
            found = max(1 - float(likenesses_P[place]), 0.0), bool(part.mirrored[place])
            nearest[pair] = min(nearest.get(pair, found), found)
        on_pairs(min(first + _PAIRS_TOGETHER, len(pairs.rows)), len(pairs.rows))
    rows_P2 = np.array(list(nearest), dtype=np.int64).reshape(-1, 2)
    distances, mirrored = zip(*nearest.values(), strict=True) if nearest else ((), ())
    return Matches(rows_P2[:, 0], rows_P2[:, 1], np.array(distances, float), np.array(mirrored, bool))


def limit_for(rows: np.ndarray, distances: np.ndarray, pictures: int) -> float:
    """Give up to which distance two pictures of this data count as the same: `NEAR`, or `COPIED`.

    Args:
        rows: of the pairs, (P,): the pictures of which it is asked whether many are alike by nature.
        distances: of the pairs, (P,).
        pictures: how many there are.
    """
    others = rows[distances > COPIED]
    akin = len(np.unique(others))
    many = akin > max(_AKIN_SHARE * pictures, _LEAST_AKIN) and len(others) > _AKIN_TO * akin
    return COPIED if many else NEAR


# --- Proposing -------------------------------------------------------------------------------------


def _proposed(ours_NSS: Tensor, others_MSS: Tensor, *, among_themselves: bool) -> _Pairs:
    """Of each picture the few others that are nearest in light and shade, by any view."""
    whole_others, cropped_others = (Cells(_shades(others_MSS, scale)) for scale in (1.0, _CROP))
    columns = []
    for mirrored in (False, True):
        whole_ND, cropped_ND = (_shades(ours_NSS, scale, mirrored=mirrored) for scale in (1.0, _CROP))
        views = (
            (whole_ND, whole_others, 1.0),
            (whole_ND, cropped_others, _CROP),
            (cropped_ND, whole_others, 1 / _CROP),
        )
        for seen_ND, others, scale in views:
            alike_NK, others_NK = others.nearest(seen_ND, _NEAREST, but_itself=among_themselves)
            facts = torch.tensor([float(mirrored), scale]).expand(*others_NK.shape, 2)
            columns.append(torch.cat([alike_NK[..., None], others_NK[..., None].double(), facts], dim=2))
    table_NV4 = torch.cat(columns, dim=1)
    order_NV = table_NV4[..., 0].argsort(dim=1, descending=True, stable=True)[:, :_LOOKED_AT]
    chosen_P4 = table_NV4.gather(1, order_NV[..., None].expand(-1, -1, 4)).flatten(0, 1)
    rows = torch.arange(len(ours_NSS)).repeat_interleave(order_NV.shape[1])
    pairs = _Pairs(rows, chosen_P4[:, 1].long(), chosen_P4[:, 2] > 0, _placed(chosen_P4[:, 3].float()))
    return pairs.part(chosen_P4[:, 0] > -1.0)


def _both_ways(rows: Tensor, others: Tensor) -> _Pairs:
    """Pairs of which nothing is known but that something else holds them alike: as they are, and mirrored."""
    mirrored = torch.tensor([False, True]).repeat_interleave(len(rows))
    return _Pairs(rows.repeat(2), others.repeat(2), mirrored, _placed(torch.ones(2 * len(rows))))


def _placed(scales_P: Tensor) -> Tensor:
    """Placements (P, 4) in the middle."""
    zero_P = torch.zeros_like(scales_P)
    return torch.stack([scales_P, scales_P, zero_P, zero_P], dim=1)


def _shades(pictures_NSS: Tensor, scale: float, *, mirrored: bool = False) -> Tensor:
    """Light and shade at 8 x 8, centred and of unit length, so that products are correlations."""
    parts = []
    for part_NSS in pictures_NSS.split(_PICTURES_TOGETHER):
        seen_NSS = (part_NSS.flip(-1) if mirrored else part_NSS).float()
        seen_NSS = seen_NSS if scale == 1 else zoomed(seen_NSS, scale)
        coarse_ND = F.adaptive_avg_pool2d(seen_NSS[:, None], _COARSE).flatten(1)
        parts.append(F.normalize(coarse_ND - coarse_ND.mean(1, keepdim=True), dim=1))
    return torch.cat(parts)


# --- Verifying -------------------------------------------------------------------------------------


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
