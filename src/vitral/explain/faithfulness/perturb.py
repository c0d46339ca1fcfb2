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
class Perturbed:
    """What a map did to the scores of R images."""

    most_first_RS: np.ndarray  # the deletion curve: the most relevant patches go first
    least_first_RS: np.ndarray  # read from its end, the insertion curve: the most relevant come first
    saco_R: np.ndarray


def ends(removal: Removal, fill: Fill) -> Ends:
    """Scores the images whole and empty."""
    images_B = torch.arange(len(removal.images_BCHW))
    all_BN = torch.arange(removal.num_patches).expand(len(images_B), -1)
    return Ends(removal.scores(fill, images_B, all_BN), removal.scores(fill, images_B, all_BN[:, :0]))


def perturb(
    removal: Removal, fill: Fill, maps_BN: Tensor, order_BN: Tensor, shared: Ends, steps: int
) -> Perturbed:
    """Takes away the patches of each image in the order of its map and in the reverse, and in groups.

    Args:
        removal: the images.
        fill: what is in their place.
        maps_BN: the map of each image.
        order_BN: `curves.most_first` of them.
        shared: `ends` of the same fill.
        steps: of a curve.
    """
    curves_2BS = _curves(removal, fill, order_BN, shared, steps)
    drops_BG = shared.whole_B[:, None] - _without_groups(removal, fill, order_BN)
    saco_B = curves.saco(maps_BN.cpu().numpy(), order_BN.numpy(), drops_BG.numpy())
    return Perturbed(curves_2BS[0], curves_2BS[1], saco_B)


def _curves(removal: Removal, fill: Fill, order_BN: Tensor, shared: Ends, steps: int) -> np.ndarray:
    """Both orders' scores at each count of removed patches, (2, B, S); one count's go in one batch."""
    images_B = torch.arange(len(order_BN))
    both_RN = torch.cat([order_BN, order_BN.flip(1)])
    points = [shared.whole_B.repeat(2)]
    for count in curves.removed_counts(removal.num_patches, steps)[1:-1]:
        points.append(removal.scores(fill, images_B.repeat(2), both_RN[:, count:]))
    points.append(shared.empty_B.repeat(2))
    return torch.stack(points, dim=1).unflatten(0, (2, -1)).double().numpy()


def _without_groups(removal: Removal, fill: Fill, order_BN: Tensor) -> Tensor:
    """The scores without each of SaCo's groups alone, (B, G); groups of one size go in one batch."""
    parts = curves.groups(removal.num_patches)
    found_BG = torch.empty(len(order_BN), len(parts))
    sizes = [part.stop - part.start for part in parts]
    for size in sorted(set(sizes)):
        places = [place for place, of in enumerate(sizes) if of == size]
        kept_RK = torch.cat([all_but(order_BN, parts[place]) for place in places])
        scores_R = removal.scores(fill, torch.arange(len(order_BN)).repeat(len(places)), kept_RK)
        found_BG[:, places] = scores_R.unflatten(0, (len(places), -1)).T
    return found_BG
