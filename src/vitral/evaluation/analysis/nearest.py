"""`Cells`: the nearest of many vectors without comparing all pairs, which of a million would take days.

Vectors are put into cells by the nearest of some pivots, and a query looks into the few cells whose pivots
are nearest to it (an inverted file, Sivic and Zisserman, 2003). Few vectors are one cell: then it is exact.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

# Vectors of a cell, on average; cells that a query looks into.
_CELL, _VISITED = 2000, 6
# Vectors a pivot that pivots are made from, and rounds of it (k-means on the sphere).
_SAMPLED, _ROUNDS = 64, 4
_TOGETHER = 4096
_NONE = -2.0  # below any correlation


class Cells:
    """Vectors of unit length, to be asked for those of the largest product with others.

    Args:
        vectors_ND: of unit length each; not copied.
    """

    def __init__(self, vectors_ND: Tensor) -> None:
        self.vectors_ND = vectors_ND
        self._pivots_CD = _pivots(vectors_ND, max(len(vectors_ND) // _CELL, 1))
        cells_N = torch.cat(
            [(part_ND @ self._pivots_CD.T).argmax(1) for part_ND in vectors_ND.split(_TOGETHER)]
        )
        counts = torch.bincount(cells_N, minlength=len(self._pivots_CD)).tolist()
        self._members = cells_N.argsort(stable=True).split(counts)

    def nearest(self, queries_QD: Tensor, count: int, *, but_itself: bool = False) -> tuple[Tensor, Tensor]:
        """Give the products (Q, K) with the `count` nearest vectors, largest first, and their rows (Q, K).

        Where a query finds fewer, the product is -2.

        Args:
            queries_QD: of unit length each.
            count: K.
            but_itself: whether query q stands for vector q, which is not given.
        """
        wanted = count + but_itself
        visited_QV = torch.cat(
            [
                (part_QD @ self._pivots_CD.T).topk(min(_VISITED, len(self._pivots_CD))).indices
                for part_QD in queries_QD.split(_TOGETHER)
            ]
        )
        alike_QVK = torch.full((*visited_QV.shape, wanted), _NONE)
        rows_QVK = torch.zeros_like(alike_QVK, dtype=torch.int64)
        order = visited_QV.flatten().argsort(stable=True)
        counts = torch.bincount(visited_QV.flatten(), minlength=len(self._members)).tolist()
        for members, asking in zip(self._members, order.split(counts), strict=True):
            found_MD = self.vectors_ND[members]
            for places in asking.split(_TOGETHER) if len(members) else ():
                query, slot = places // visited_QV.shape[1], places % visited_QV.shape[1]
                few = min(wanted, len(members))
                alike_PK, at_PK = (queries_QD[query] @ found_MD.T).topk(few)
                alike_QVK[query, slot, :few], rows_QVK[query, slot, :few] = alike_PK, members[at_PK]
        alike_QK, rows_QK = alike_QVK.flatten(1), rows_QVK.flatten(1)
        if but_itself:
            alike_QK[rows_QK == torch.arange(len(queries_QD))[:, None]] = _NONE
        alike_QK, at_QK = alike_QK.topk(min(count, alike_QK.shape[1]))
        return alike_QK, rows_QK.gather(1, at_QK)


def _pivots(vectors_ND: Tensor, count: int) -> Tensor:
    """`count` vectors of unit length that the others lie around."""
    if count == 1:
        return torch.zeros(1, vectors_ND.shape[1])
    every = max(len(vectors_ND) // (count * _SAMPLED), 1)
    sample_SD = vectors_ND[::every]
    pivots_CD = sample_SD[:: max(len(sample_SD) // count, 1)][:count]
    for _ in range(_ROUNDS):
        nearest_S = torch.cat([(part_SD @ pivots_CD.T).argmax(1) for part_SD in sample_SD.split(_TOGETHER)])
        sums_CD = torch.zeros_like(pivots_CD).index_add_(0, nearest_S, sample_SD)
        pivots_CD = torch.where(sums_CD.norm(dim=1, keepdim=True) > 0, F.normalize(sums_CD, dim=1), pivots_CD)
    return pivots_CD
