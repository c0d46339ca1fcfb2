"""Laying one small picture over another: how alike two are in detail once a crop of one is undone.

P pairs of grey pictures of S pixels a side. A placement (P, 4) says which part of the second shows what the
first shows: its scale and its shift, (sx, sy, tx, ty), in units in which the second reaches from -1 to 1.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

# No crop that leaves less of a picture is looked for.
_LEAST_SCALE, _MOST_SHIFT = 0.7, 0.3
_LONGEST_STEP = 0.08
_DAMPING = (0.1, 0.1, 0.1, 0.1, 1e-3, 1e-3)
_TINY = 1e-6
_EDGE = 2  # pixels


def align(first_PSS: Tensor, second_PSS: Tensor, placement_P4: Tensor, steps: int) -> Tensor:
    """Improve placements by Gauss-Newton steps on the squared difference (Lucas and Kanade, 1981).

    Brightness and contrast may differ: they are unknowns of each step too.
    """
    x_SS, y_SS = _coordinates(first_PSS.shape[-1])
    first_PSS, second_PSS = _standardized(_smoothed(first_PSS, 3)), _standardized(_smoothed(second_PSS, 3))
    spacing, damping = 2 / first_PSS.shape[-1], torch.diag(torch.tensor(_DAMPING))
    for _ in range(steps):
        laid_PSS, seen_PSS = _laid_over(second_PSS, placement_P4)
        down_PSS, along_PSS = torch.gradient(laid_PSS, spacing=spacing, dim=(1, 2))
        changes = along_PSS * x_SS, down_PSS * y_SS, along_PSS, down_PSS, laid_PSS, torch.ones_like(laid_PSS)
        slopes_P6N = (torch.stack(changes, 1) * seen_PSS[:, None]).flatten(2)
        rest_PN1 = ((first_PSS - laid_PSS) * seen_PSS).flatten(1)[..., None]
        squares_P66 = slopes_P6N @ slopes_P6N.transpose(1, 2)
        change_P4 = torch.linalg.solve(squares_P66 + damping, slopes_P6N @ rest_PN1)[:, :4, 0]
        placement_P4 = placement_P4 + change_P4.clamp(-_LONGEST_STEP, _LONGEST_STEP)
        scales_P2, shifts_P2 = placement_P4.split(2, dim=1)
        scales_P2 = scales_P2.clamp(_LEAST_SCALE, 1 / _LEAST_SCALE)
        placement_P4 = torch.cat([scales_P2, shifts_P2.clamp(-_MOST_SHIFT, _MOST_SHIFT)], dim=1)
    return placement_P4


def likeness(first_PSS: Tensor, second_PSS: Tensor, placement_P4: Tensor) -> Tensor:
    """Correlate the detail of pairs where they overlap, (P,) in -1..1.

    Detail is what differs from the mean of the 5 x 5 pixels around: two skies have the same light, and not
    the same clouds. At the edges, where some of these pixels are not there, it is not compared.
    """
    laid_PSS, seen_PSS = _laid_over(second_PSS - _smoothed(second_PSS, 2 * _EDGE + 1), placement_P4, _EDGE)
    seen_PSS = seen_PSS * F.pad(torch.ones_like(seen_PSS[:, _EDGE:-_EDGE, _EDGE:-_EDGE]), [_EDGE] * 4)
    count_P11 = seen_PSS.sum((1, 2), keepdim=True).clamp(min=1)

    def centred(values_PSS: Tensor) -> Tensor:
        mean_P11 = (values_PSS * seen_PSS).sum((1, 2), keepdim=True) / count_P11
        return (values_PSS - mean_P11) * seen_PSS

    one_PSS, other_PSS = centred(first_PSS - _smoothed(first_PSS, 2 * _EDGE + 1)), centred(laid_PSS)
    size_P = (one_PSS.square().sum((1, 2)) * other_PSS.square().sum((1, 2))).sqrt()
    return (one_PSS * other_PSS).sum((1, 2)) / size_P.clamp(min=_TINY)


def zoomed(pictures_NSS: Tensor, scale: float) -> Tensor:
    """Cut out the centre, `scale` of each side, at the same number of pixels."""
    placement_14 = torch.tensor([[scale, scale, 0.0, 0.0]])
    return _laid_over(pictures_NSS, placement_14.expand(len(pictures_NSS), 4))[0]


def _laid_over(pictures_PSS: Tensor, placement_P4: Tensor, edge: int = 0) -> tuple[Tensor, Tensor]:
    """The second picture as placed, and 1 where it is there, 0 on its edge of so many pixels and beyond."""
    inside = 1 - 2 * edge / pictures_PSS.shape[-1]
    x_SS, y_SS = _coordinates(pictures_PSS.shape[-1])
    scale_x, scale_y, shift_x, shift_y = placement_P4[:, :, None, None].unbind(1)
    across_PSS, down_PSS = scale_x * x_SS + shift_x, scale_y * y_SS + shift_y
    places_PSS2 = torch.stack([across_PSS, down_PSS], -1)
    laid_PSS = F.grid_sample(pictures_PSS[:, None], places_PSS2, padding_mode="border", align_corners=False)[
        :, 0
    ]
    return laid_PSS, ((across_PSS.abs() <= inside) & (down_PSS.abs() <= inside)).float()


def _coordinates(side: int) -> tuple[Tensor, Tensor]:
    """Of the middles of the pixels, across and down, (S, S) each."""
    line = torch.linspace(-1 + 1 / side, 1 - 1 / side, side)
    y_SS, x_SS = torch.meshgrid(line, line, indexing="ij")
    return x_SS, y_SS


def _smoothed(pictures_PSS: Tensor, width: int) -> Tensor:
    """The mean of `width` x `width` pixels, by rows and then by columns: a third of `avg_pool2d`'s time."""
    side, margin = pictures_PSS.shape[-1], width // 2
    padded_PTT = F.pad(pictures_PSS[:, None], [margin] * 4, mode="replicate")[:, 0]
    rows_PST = padded_PTT[:, :side].clone()
    for shift in range(1, width):
        rows_PST += padded_PTT[:, shift : shift + side]
    sums_PSS = rows_PST[..., :side].clone()
    for shift in range(1, width):
        sums_PSS += rows_PST[..., shift : shift + side]
    return sums_PSS / width**2


def _standardized(pictures_PSS: Tensor) -> Tensor:
    centred_PSS = pictures_PSS - pictures_PSS.mean((1, 2), keepdim=True)
    return centred_PSS / (centred_PSS.std((1, 2), keepdim=True) + _TINY)
