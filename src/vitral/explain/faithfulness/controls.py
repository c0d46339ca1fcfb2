"""Maps that know nothing of the model, by which the others are judged: random, and the middle of the picture."""

from collections.abc import Sequence

import torch
from torch import Tensor

from vitral.model.config import Grid

_WIDTH = 0.25  # of the centre's bell, as a share of the picture's side


def random_maps(grid: Grid, seeds: Sequence[int]) -> Tensor:
    """Independent values, uniform from 0 to 1, drawn by each image's seed: (R, rows, columns)."""
    return torch.stack([torch.rand(grid, generator=torch.Generator().manual_seed(seed)) for seed in seeds])


def centre_maps(grid: Grid, count: int) -> Tensor:
    """A bell around the middle, the same for all images, as most photographs show their object there."""
    rows, columns = (((torch.arange(side) + 0.5) / side - 0.5) / _WIDTH for side in grid)
    bell = torch.exp(-(rows[:, None] ** 2 + columns**2) / 2)
    return bell.expand(count, *grid).clone()
