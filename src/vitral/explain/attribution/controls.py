"""Maps that know nothing of the model, to judge others by: random, and the middle of the picture."""

import zlib

import torch
from torch import Tensor

from vitral.explain.attribution.method import Found, Subject
from vitral.model.config import Grid

_WIDTH = 0.25  # of the centre's bell, as a share of the picture's side


def random_maps(subject: Subject) -> Found:
    """Independent values, uniform from 0 to 1; one image and seed have one map, whatever the batch."""
    grid = subject.model.embedding.grid_of(subject.images_BCHW)
    images_BCHW = subject.images_BCHW.float().cpu().contiguous().numpy()
    seeds = [zlib.crc32(image.tobytes(), subject.settings.seed) for image in images_BCHW]
    maps = [torch.rand(grid, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    return Found(torch.stack(maps).flatten(1), _logits(subject))


def centre_maps(subject: Subject) -> Found:
    """A bell around the middle, the same for all images, as most photographs show their object there."""
    bell_N = bell(subject.model.embedding.grid_of(subject.images_BCHW)).flatten()
    return Found(bell_N.repeat(len(subject.images_BCHW), 1), _logits(subject))


def bell(grid: Grid) -> Tensor:
    """A Gaussian around the middle: (rows, columns)."""
    rows, columns = (((torch.arange(side) + 0.5) / side - 0.5) / _WIDTH for side in grid)
    return torch.exp(-(rows[:, None] ** 2 + columns**2) / 2)


def _logits(subject: Subject) -> Tensor:
    with torch.inference_mode(), subject.classifier.placement.autocast():
        return subject.model(subject.images_BCHW)
