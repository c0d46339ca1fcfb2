"""Tables of positions and patch projections at another size: the rules in use, each by its own name."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from vitral.model.config import Grid, Resize
from vitral.model.positions.kept import same_grid


def _interpolate(mode: str, **options: bool) -> Callable[[Tensor, Grid], Tensor]:
    return lambda image_1DHW, grid: F.interpolate(image_1DHW, grid, mode=mode, **options)


def _bicubic_offset(image_1DHW: Tensor, grid: Grid) -> Tensor:
    rows, columns = image_1DHW.shape[2:]
    scale = (grid[0] + 0.1) / rows, (grid[1] + 0.1) / columns
    return F.interpolate(image_1DHW, scale_factor=scale, mode="bicubic")


def _geometric(image_1DHW: Tensor, grid: Grid) -> Tensor:
    """Linear between distances spaced in geometric progression, dense near zero (BEiT's fine-tuning code)."""
    down, across = (
        _geometric_weights(old, new).to(image_1DHW)
        for old, new in zip(image_1DHW.shape[2:], grid, strict=True)
    )
    return down @ image_1DHW @ across.T


def _geometric_weights(old: int, new: int) -> Tensor:
    """(new, old): each new distance as a mixture of the two old ones around it."""
    low = ratio = 1.01
    high = 1.5
    while high - low > 1e-6:
        ratio = (low + high) / 2
        reach = (1 - ratio ** (old // 2)) / (1 - ratio)
        low, high = (low, ratio) if reach > new // 2 else (ratio, high)
    distances = [sum(ratio**step for step in range(count)) for count in range(old // 2 + 1)]
    old_places = torch.tensor([-d for d in distances[:0:-1]] + distances, dtype=torch.float64)
    new_places = torch.arange(-(new // 2), new // 2 + 1, dtype=torch.float64)
    right = torch.searchsorted(old_places, new_places).clamp(1, old - 1)
    span = old_places[right] - old_places[right - 1]
    share = ((new_places - old_places[right - 1]) / span).clamp(0, 1)
    weights = torch.zeros(new, old, dtype=torch.float64)
    weights.scatter_(1, (right - 1)[:, None], (1 - share)[:, None])
    return weights.scatter_add_(1, right[:, None], share[:, None])


# The rules in use. None is better; the one that a model was trained or evaluated with is right for it.
RESIZE: dict[str, Callable[[Tensor, Grid], Tensor]] = {
    "bilinear": _interpolate("bilinear"),  # timm on .npz files, RADIO; BEiT's tables in transformers
    "bilinear_antialias": _interpolate("bilinear", antialias=True),  # jax.image: FlexiViT; SigLIP 2
    "bilinear_corners": _interpolate(
        "bilinear", align_corners=True
    ),  # scipy's zoom: Google's ViT, big_vision
    "bicubic": _interpolate("bicubic"),  # DeiT, MAE, transformers
    "bicubic_antialias": _interpolate("bicubic", antialias=True),  # timm; DINOv2 with registers
    "bicubic_corners": _interpolate("bicubic", align_corners=True),  # torchvision
    "bicubic_offset": _bicubic_offset,  # DINO and DINOv2: a scale 0.1 patches too large
    "geometric": _geometric,  # BEiT's relative tables in timm
}
assert set(RESIZE) == set(get_args(Resize))


def resize_grid(table_ND: Tensor, old: Grid, new: Grid, rule: Resize) -> Tensor:
    """A row-major table (N, D) over the grid `old`, at the grid `new`; computed in float32."""
    if same_grid(old, new):
        return table_ND
    image_1DHW = table_ND.float().unflatten(0, old).permute(2, 0, 1)[None]
    with _without_autocast(table_ND.device):
        resized_1DHW = RESIZE[rule](image_1DHW, new)
    return resized_1DHW[0].flatten(1).T.to(table_ND.dtype).contiguous()


def _without_autocast(device: torch.device) -> AbstractContextManager:
    # It does not know the meta device.
    return nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)


def resize_patches(weight_DCHW: Tensor, patch_size: int, rule: Resize) -> Tensor:
    """A patch projection (D, C, p, p) for another patch size, by pseudo-inverse.

    FlexiViT (arXiv:2212.08013), §3.4: the weights under which a patch that is resized as `rule` does
    gives the token that the old weights gave.
    """
    old = weight_DCHW.shape[-1]
    if old == patch_size:
        return weight_DCHW
    basis = torch.eye(old * old, dtype=torch.float64).reshape(-1, 1, old, old)
    resized = [RESIZE[rule](image[None], (patch_size, patch_size)).flatten() for image in basis]
    # Rows are the old pixels; a new weight w' solves resize(x) . w' = x . w in the least squares sense.
    inverse = torch.linalg.pinv(torch.stack(resized))
    pixels = weight_DCHW.double().flatten(2) @ inverse.T
    return pixels.unflatten(2, (patch_size, patch_size)).to(weight_DCHW.dtype)
