"""How every weight of a Vision Transformer starts: the rules with their sources, and the walk over a model.

A module draws the parameters that are its own in `reset_parameters`, by a rule of this file.
"""

from math import pi

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vitral.model.config import Grid

# Of tokens, tables and linear maps, truncated normal: timm's ViT and DeiT (arXiv:2012.12877).
INIT_STD = 0.02
# Farther patches start with almost no weight, exp(-12). Without the cap they could not be learned.
_FARTHEST_SQUARED = 12
# Added to variances, of pixels that deviate by about 0.5: directions that hold only noise are not blown up.
_WHITENING_FLOOR = 0.01


@torch.no_grad()
def initialize_weights(root: nn.Module) -> None:
    """Draws every parameter under `root` afresh, in the order in which the modules stand in it."""
    for module in root.modules():
        match module:
            case nn.Conv2d():  # drawn by its owner: a linear map of patches, or a filter before a ReLU
                pass
            case nn.Linear():
                linear_map(module)
            case _ if callable(reset := getattr(module, "reset_parameters", None)):
                reset()  # a part of ours, or a norm, which starts as the identity


# --- The rules -------------------------------------------------------------------------------------


def truncated_normal(tensor: Tensor) -> None:
    """Tokens before the patches, learned positions, the query of attention pooling."""
    nn.init.trunc_normal_(tensor, std=INIT_STD)


def linear_map(layer: nn.Linear | nn.Conv2d) -> None:
    """All linear maps, the patch projection too: truncated normal, biases zero (timm, DeiT)."""
    truncated_normal(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)


def filter_before_relu(layer: nn.Conv2d) -> None:
    """The stem's convolutions: variance 2 / fan-in (He et al., arXiv:1502.01852, eq. 10)."""
    nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")


@torch.no_grad()
def whitening_filters(weight_FCHW: Tensor, images_BCHW: Tensor) -> None:
    """Filters that whiten the pixels under them in these images.

    They are the principal directions, each divided by its deviation, the largest first, then their
    negatives, for ReLU keeps one side (Jordan, arXiv:2404.00498, §3.1, where they stay fixed). Filters
    beyond those are left as they were drawn.
    """
    patches_NP = F.unfold(images_BCHW, weight_FCHW.shape[2]).transpose(1, 2).flatten(0, 1)
    variances, directions = torch.linalg.eigh(patches_NP.T.cov())
    filters = (directions / (variances + _WHITENING_FLOOR).sqrt()).T.flip(0)
    both = torch.cat([filters, -filters])[: len(weight_FCHW)]
    weight_FCHW[: len(both)] = both.view(-1, *weight_FCHW.shape[1:])


def turned_frequencies(bands: Tensor, num_heads: int) -> Tensor:
    """RoPE-ViT's start of "mixed" frequencies (arXiv:2403.13298), (2, A, K / 2).

    The axial frequencies, (K / 4,), turned by a random angle for each head.
    """
    angle = torch.rand(num_heads, 1, device=bands.device) * 2 * pi
    return torch.stack(
        [torch.cat([bands * f(angle), bands * f(angle + pi / 2)], -1) for f in (torch.cos, torch.sin)]
    )


def local_bias(grid: Grid, num_heads: int) -> Tensor:
    """Rows (M, A) that centre each head's attention on one of its patch's nearest neighbours.

    -(distance to that neighbour)^2, the start of ConViT's positional attention (arXiv:2103.10697, eq. 5
    and 6, locality strength 1): a softmax of it is a blurred 3x3 filter with a single tap.

    Raises:
        ValueError: if there are more heads than neighbours.
    """
    rows, columns = grid
    steps = torch.cartesian_prod(torch.arange(1 - rows, rows), torch.arange(1 - columns, columns)).float()
    # The table's row is "query minus key", and the key stands where the head looks.
    places = -steps
    nearest = places[places.norm(dim=1).argsort(stable=True)][1 : num_heads + 1]
    if len(nearest) < num_heads:
        raise ValueError(
            f"num_heads is {num_heads}; with relative_start='local' each head needs a neighbour of its own, "
            f"and a grid of {rows}x{columns} patches has {len(nearest)}"
        )
    return -torch.cdist(places, nearest).square().clamp(max=_FARTHEST_SQUARED)
