"""The randomization check (Adebayo et al., arXiv:1810.03292): does a map change when the weights are redrawn?

The cascade goes from the head down, as theirs does. A map that stays the same shows the picture, or the
network's shape, and not what the network learned.
"""

import copy
import hashlib
from fractions import Fraction
from math import ceil

import numpy as np
import torch
from torch import Tensor

from vitral.model.vit import VisionTransformer

# How much of the layers each stage redraws, from the last on. All redraw the head; the last stage redraws the
# embedding too, and what layers share.
STAGES = {
    "head": Fraction(0),
    "top quarter": Fraction(1, 4),
    "top half": Fraction(1, 2),
    "all layers": Fraction(1),
    "everything": Fraction(1),
}
HALF = "top half"
PASSES_BELOW = 0.3  # of the rank correlation with the top half redrawn


@torch.no_grad()
def redrawn(model: VisionTransformer, stage: str, seed: int = 0) -> VisionTransformer:
    """Copies a model, the upper weights of the copy drawn anew: each from its tensor's own values.

    Drawn without replacement, which is a shuffle, so that what was learned goes and the scale of every tensor
    stays. The rules by which weights begin would not do: a head that begins at zero has no gradient, and a
    `LayerScale` that begins at 1e-5 takes its layer out.

    Args:
        model: stays as it is.
        stage: one of `STAGES`; what it redraws, all later ones redraw alike.
        seed: of the draws.
    """
    changed = copy.deepcopy(model)
    depth = len(model.layers)
    first = depth - ceil(STAGES[stage] * depth)
    for name, parameter in changed.named_parameters():
        if stage == "everything" or not name.startswith(_kept(model, first)):
            order = torch.randperm(parameter.numel(), generator=_generator(name, seed))
            parameter.copy_(parameter.flatten()[order.to(parameter.device)].view_as(parameter))
    return changed.eval()


def _kept(model: VisionTransformer, first: int) -> tuple[str, ...]:
    """Beginnings of the names of what stays, if the layers from the first one on are redrawn."""
    kept = ["embedding.", *(f"layers.{index}." for index in range(first))]
    own = len(model.relations) == len(model.layers) > 1  # positions that each layer has for itself
    kept += [f"relations.{index}." for index in range(first)] if own else ["relations."]
    return tuple(kept)


def _generator(name: str, seed: int) -> torch.Generator:
    digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=7).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest))


def rank_correlation(maps_RN: Tensor, others_RN: Tensor) -> np.ndarray:
    """Computes Spearman's rank correlation of each two maps, (R,); 0 where one of them is constant."""
    from scipy.stats import rankdata

    first, second = (rankdata(maps.cpu().double().numpy(), axis=1) for maps in (maps_RN, others_RN))
    first, second = (ranks - ranks.mean(axis=1, keepdims=True) for ranks in (first, second))
    scale = np.sqrt((first**2).sum(axis=1) * (second**2).sum(axis=1))
    return np.divide((first * second).sum(axis=1), scale, out=np.zeros(len(first)), where=scale > 0)
