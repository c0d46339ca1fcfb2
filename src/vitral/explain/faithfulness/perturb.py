"""What becomes of the scores as the patches that maps name are taken away. Axes are those of `curves`."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from vitral.explain.faithfulness import curves
from vitral.explain.faithfulness.removal import Fill, Removal, all_but


@dataclass(frozen=True)
class Ends:
    """The scores that all maps share, (B,) each: of the image as it is, and without any patch."""

    whole_B: Tensor
    empty_B: Tensor


@dataclass(frozen=True)
class Curves:
    """The scores of R images at each point, as the patches go by a map."""

    most_first_RS: np.ndarray  # the deletion curve: the most relevant patches go first
    least_first_RS: np.ndarray  # read from its end, the insertion curve: the most relevant come first


def ends(removal: Removal, fill: Fill) -> Ends:
    """Scores the images whole and empty."""
    images_B = torch.arange(len(removal.images_BCHW))
    all_BN = torch.arange(removal.num_patches).expand(len(images_B), -1)
    return Ends(removal.scores(fill, images_B, all_BN), removal.scores(fill, images_B, all_BN[:, :0]))


def take_away(removal: Removal, fill: Fill, order_BN: Tensor, shared: Ends, steps: int) -> Curves:
    """Takes away the patches in an order and in its reverse; at each count both go in one batch.

    Args:
        removal: the images.
        fill: what is in the place of patches.
        order_BN: `curves.most_first` of a map of each image.
        shared: `ends` of the same fill.
        steps: of a curve.
    """
    images_R = torch.arange(len(order_BN)).repeat(2)
    both_RN = torch.cat([order_BN, order_BN.flip(1)])
    points = [shared.whole_B.repeat(2)]
    for count in curves.removed_counts(removal.num_patches, steps)[1:-1]:
        points.append(removal.scores(fill, images_R, both_RN[:, count:]))
    points.append(shared.empty_B.repeat(2))
    most_first_RS, least_first_RS = torch.stack(points, dim=1).double().chunk(2)
    return Curves(most_first_RS.numpy(), least_first_RS.numpy())


def saco(removal: Removal, fill: Fill, maps_BN: Tensor, order_BN: Tensor, shared: Ends) -> np.ndarray:
    """Takes away SaCo's groups one at a time, those of one size in one batch: (B,) of `curves.saco`."""
    parts = curves.groups(removal.num_patches)
    left_BG = torch.empty(len(order_BN), len(parts))
    sizes = [part.stop - part.start for part in parts]
    for size in sorted(set(sizes)):
        places = [place for place, of in enumerate(sizes) if of == size]
        kept_RK = torch.cat([all_but(order_BN, parts[place]) for place in places])
        scores_R = removal.scores(fill, torch.arange(len(order_BN)).repeat(len(places)), kept_RK)
        left_BG[:, places] = scores_R.unflatten(0, (len(places), -1)).T
    drops_BG = shared.whole_B[:, None] - left_BG
    return curves.saco(maps_BN.numpy(), order_BN.numpy(), drops_BG.numpy())
