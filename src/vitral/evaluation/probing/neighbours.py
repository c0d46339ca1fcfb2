"""Weighted nearest neighbours among frozen features."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from vitral.evaluation.probing.choosing import Choice, Labelled, Method
from vitral.evaluation.single_label import SingleLabelEvaluation, SingleLabelOutcomes
from vitral.inference.features import PooledFeatures
from vitral.model.config import Pooling

NEIGHBOURS = (10, 20)
_VOTE_TEMPERATURE = 0.07  # DINO's (arXiv:2104.14294, appendix F.1; Wu et al., arXiv:1805.01978, §3.4)
_CHUNK = 1024  # queries at a time, for their similarities to all labelled images


@dataclass(frozen=True)
class NeighboursResult:
    """The vote of the k most similar labelled images (cosine), each weighing exp(similarity / 0.07)."""

    features: Pooling
    layer: int
    k: int
    held_out_top1: float | None
    n: int
    top1: float
    ci95: tuple[float, float]


def neighbour_votes(
    vectors_ND: Tensor, labels_N: np.ndarray, queries_QD: Tensor, num_classes: int, ks: Sequence[float]
) -> list[Tensor]:
    """For each k, the logarithm of the classes' shares of the votes (Q, L).

    Each of the k labelled vectors with the largest cosine votes for its class with weight
    exp(cosine / 0.07); a class without a vote counts as one vote in a million.
    """
    bank_ND, labels = F.normalize(vectors_ND, dim=1), torch.from_numpy(labels_N)
    numbers = [min(int(k), len(labels)) for k in ks]
    found: list[list[Tensor]] = [[] for _ in numbers]
    for chunk_QD in F.normalize(queries_QD, dim=1).split(_CHUNK):
        nearest = (chunk_QD @ bank_ND.T).topk(max(numbers), dim=1)
        # Relative to the nearest, which changes no share and cannot overflow.
        weights_QK = ((nearest.values - nearest.values[:, :1]) / _VOTE_TEMPERATURE).exp()
        for k, shares in zip(numbers, found, strict=True):
            votes_QL = torch.zeros(len(chunk_QD), num_classes)
            votes_QL.scatter_add_(1, labels[nearest.indices[:, :k]], weights_QK[:, :k])
            shares.append(votes_QL / votes_QL.sum(1, keepdim=True))
    return [torch.cat(shares).clamp_min(1e-6).log() for shares in found]


NEAREST = Method(
    NEIGHBOURS, 10, neighbour_votes, lambda choice: (choice.held_out_top1, -(choice.held_out_loss or 0.0))
)


def judge_neighbours(
    choice: Choice, labelled: Labelled, judged: PooledFeatures, classes: Sequence[str]
) -> NeighboursResult:
    queries = judged.of(choice.layer, choice.features)
    (votes,) = neighbour_votes(
        labelled.of(choice), labelled.labels, queries, labelled.num_classes, [choice.setting]
    )
    evaluation = SingleLabelEvaluation.of(
        SingleLabelOutcomes.of(votes, torch.from_numpy(judged.labels)), classes
    )
    return NeighboursResult(
        choice.features,
        choice.layer,
        int(choice.setting),
        choice.held_out_top1,
        evaluation.n,
        evaluation.top1,
        evaluation.ci95,
    )
