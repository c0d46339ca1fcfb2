"""What maps say of the order of patches, and what is made of the scores as patches go: curves, SRG, SaCo.

R counts images (or rows of a batch), N patches, S steps of a curve, G groups of SaCo.
"""

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

# Of a curve. With 16 the areas of a ViT on CIFAR-10 were 4 % larger, their intervals as much wider, and the
# order of methods the same (docs/log.md, 2026-11-26).
STEPS = 8
GROUPS = 10  # K of SaCo (arXiv:2404.01415)


def most_first(maps_RN: Tensor, seeds: Sequence[int]) -> Tensor:
    """Orders the patches of each map from the most relevant on: indices (R, N).

    Equal values are in an order drawn by the image's seed: that of the indices would favour the picture's top
    left. Numbers that are not finite have no order.

    Raises:
        ValueError: if a map holds one.
    """
    if not maps_RN.isfinite().all():
        raise ValueError("a map holds NaN or infinity, so its patches have no order")
    shuffles_RN = torch.stack(
        [torch.randperm(maps_RN.shape[1], generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    )
    ranked_RN = maps_RN.cpu().gather(1, shuffles_RN).argsort(dim=1, descending=True, stable=True)
    return shuffles_RN.gather(1, ranked_RN)


def removed_counts(num_patches: int, steps: int = STEPS) -> list[int]:
    """How many patches are gone at each point of a curve, from none to all: at most steps + 1 points."""
    return np.unique(np.linspace(0, num_patches, steps + 1).round().astype(int)).tolist()


def area(curves_RS: np.ndarray, counts: Sequence[int]) -> np.ndarray:
    """The mean height of curves over the share of patches that is gone, by trapezoids: (R,)."""
    return np.trapezoid(curves_RS, np.asarray(counts) / counts[-1], axis=-1)


def groups(num_patches: int) -> list[slice]:
    """SaCo's groups, as places in an order of the patches: ten of one size, give or take a patch."""
    edges = np.linspace(0, num_patches, min(GROUPS, num_patches) + 1).round().astype(int).tolist()
    return [slice(first, last) for first, last in pairwise(edges)]


def saco(maps_RN: np.ndarray, order_RN: np.ndarray, drops_RG: np.ndarray) -> np.ndarray:
    """Salience-guided faithfulness (SaCo, arXiv:2404.01415, algorithm 1): (R,), from -1 to 1.

    Do groups of patches that a map gives more take more of the score with them, and by as much as it says?
    Both are counted a patch, so that groups of 19 and 20 patches compare fairly; of equal groups this is
    the paper's. A map that is constant claims nothing, and gets 0.

    Args:
        maps_RN: values of the patches.
        order_RN: `most_first` of them.
        drops_RG: how much of the score each group takes with it alone.
    """
    parts = groups(maps_RN.shape[1])
    ordered_RN = np.take_along_axis(maps_RN.astype(float), order_RN, axis=1)
    given_RG = np.stack([ordered_RN[:, part].mean(axis=1) for part in parts], axis=1)
    taken_RG = drops_RG / np.array([part.stop - part.start for part in parts])
    first, second = np.triu_indices(len(parts), k=1)
    claims = given_RG[:, first] - given_RG[:, second]
    agree = taken_RG[:, first] >= taken_RG[:, second]
    total = np.abs(claims).sum(axis=1)
    kept = np.where(agree, claims, -claims).sum(axis=1)
    return np.divide(kept, total, out=np.zeros_like(total), where=total > 0)
