"""Methods that leave tokens out and see what becomes of the score: occlusion and RISE.

A token that is left out leaves nothing behind that looks like something: no grey square. The others keep
their places. Under a convolutional stem, which sees across the borders of patches, the pixels of what is left
out get the mean colour besides. M counts masks; other axes are those of `model/embedding.py`.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from vitral.explain.attribution.method import Found, Subject
from vitral.explain.faithfulness.removal import Removal
from vitral.model.config import Grid
from vitral.runtime.errors import VitralError

_ROWS = 64  # images between two reports of progress
_CELLS = 8  # RISE's masks are smooth, of so many cells a side (arXiv:1806.07421, §4.2)


def occlusion(subject: Subject) -> Found:
    """Occlusion (arXiv:1311.2901, §4.2): how much the score falls without a patch."""
    logits_BL, removal = _removal(subject)
    batch, count = len(subject.images_BCHW), removal.num_patches
    others_NK = torch.arange(count).repeat(count, 1)[~torch.eye(count, dtype=torch.bool)].view(count, -1)
    images_R = torch.arange(batch).repeat_interleave(count)
    without_R = _scores(subject, removal, images_R, others_NK.repeat(batch, 1))
    whole_B = removal.question.scores(logits_BL).cpu()
    return Found(whole_B[:, None] - without_R.view(batch, count), logits_BL)


def rise(subject: Subject) -> Found:
    """RISE (arXiv:1806.07421, eq. 6): the mean score of random choices that keep a patch, less that of all.

    Each choice keeps as many patches, so that a batch of them is rectangular: those where a smooth random
    field is highest. The paper divides by how often a patch is kept on average; here it is counted. All
    images get the same choices.
    """
    logits_BL, removal = _removal(subject)
    settings, batch = subject.settings, len(subject.images_BCHW)
    count = min(max(round(settings.kept * removal.num_patches), 1), removal.num_patches - 1)
    kept_MK = smooth_choices(removal.grid, count, settings.masks, settings.seed)
    images_R = torch.arange(batch).repeat(settings.masks)
    scores_R = _scores(subject, removal, images_R, kept_MK.repeat_interleave(batch, 0))
    scores_BM = scores_R.view(settings.masks, batch).T
    kept_MN = torch.zeros(settings.masks, removal.num_patches).scatter_(1, kept_MK, 1)
    above_BM = scores_BM - scores_BM.mean(dim=1, keepdim=True)
    return Found(above_BM @ kept_MN / kept_MN.sum(dim=0).clamp_min(1), logits_BL)


def smooth_choices(grid: Grid, kept: int, masks: int, seed: int) -> Tensor:
    """Chooses patches where smooth random fields are highest: (M, K).

    A field is uniform noise at the corners of 8 x 8 cells, bilinear between them and shifted at random.
    """
    generator = torch.Generator().manual_seed(seed)
    noise_MCC = torch.rand(masks, _CELLS + 2, _CELLS + 2, generator=generator)
    rows_MRC, columns_MGC = (_hats(side, torch.rand(masks, generator=generator)) for side in grid)
    fields_MN = (rows_MRC @ noise_MCC @ columns_MGC.mT).flatten(1)
    return fields_MN.topk(kept, dim=1).indices


def _hats(side: int, shifts_M: Tensor) -> Tensor:
    """How much of each corner is in each patch along a side, bilinearly: (M, side, cells + 2)."""
    cell = max(side / _CELLS, 1)  # in patches
    places_MS = torch.arange(side) / cell + shifts_M[:, None]
    return (1 - (places_MS[:, :, None] - torch.arange(_CELLS + 2)).abs()).clamp_min(0)


def _removal(subject: Subject) -> tuple[Tensor, Removal]:
    with torch.inference_mode(), subject.classifier.placement.autocast():
        logits_BL = subject.model(subject.images_BCHW)
    removal = Removal(subject.classifier, subject.images_BCHW, subject.ask(logits_BL))
    if removal.num_patches < 2:
        raise VitralError("this model sees one patch, and nothing is left without it; legrad can serve")
    return logits_BL, removal


def _scores(subject: Subject, removal: Removal, images_R: Tensor, kept_RK: Tensor) -> Tensor:
    """As `Removal.scores` by dropping, with progress."""

    def parts() -> Iterator[Tensor]:
        for first in range(0, len(kept_RK), _ROWS):
            rows = slice(first, first + _ROWS)
            yield removal.scores("drop", images_R[rows], kept_RK[rows])
            subject.settings.progress(min((first + _ROWS) / len(kept_RK), 1))

    return torch.cat(list(parts()))
