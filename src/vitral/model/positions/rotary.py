"""Rotary positions in two dimensions: queries and keys turn by angles that depend on their places."""

from math import pi

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vitral.model import initialize
from vitral.model.config import Grid, RotaryOptions
from vitral.model.positions.relation import Relation, Rotation


class RotaryPositions(nn.Module):
    """Rotary positions of the patches; tokens before them do not turn.

    Raises:
        ValueError: if the head's width is no multiple of four.
    """

    def __init__(self, head_dim: int, num_heads: int, prefix: int, options: RotaryOptions) -> None:
        super().__init__()
        if head_dim % 4:
            raise ValueError(f"rotary positions need heads of a width divisible by 4; it is {head_dim}")
        self.head_dim, self.prefix, self.options = head_dim, prefix, options
        # Of the first and the second coordinate, for each head and pair of channels.
        shape = (2, num_heads, head_dim // 2)
        self.frequencies = nn.Parameter(torch.empty(shape)) if options.kind == "mixed" else None
        self.reset_parameters()

    def forward(self, grid: Grid, device: torch.device) -> Relation:
        first, second = _coordinates(self.options, grid, device)
        if self.frequencies is None:
            bands = _bands(self.options, self.head_dim, device)
            angles = torch.cat([first[:, None] * bands, second[:, None] * bands], dim=-1)
        else:
            by_first, by_second = self.frequencies.float()[:, :, None]
            angles = first[:, None] * by_first + second[:, None] * by_second
        angles = F.pad(angles, (0, 0, self.prefix, 0))
        if self.options.halves:
            angles = torch.cat([angles, angles], dim=-1)
        else:
            angles = angles.repeat_interleave(2, dim=-1)
        return Relation(Rotation(angles.cos(), angles.sin(), self.options.halves))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        if self.frequencies is not None:
            bands = _bands(self.options, self.head_dim, self.frequencies.device)
            self.frequencies.copy_(initialize.turned_frequencies(bands, self.frequencies.shape[1]))


def _coordinates(options: RotaryOptions, grid: Grid, device: torch.device) -> tuple[Tensor, Tensor]:
    """Two coordinates of each patch, (N,) each."""
    axes = [_places(options, count, axis) for axis, count in enumerate(grid)]
    rows, columns = (places.flatten() for places in torch.meshgrid(*axes, indexing="ij"))
    both = (columns, rows) if options.column_first else (rows, columns)
    return both[0].to(device), both[1].to(device)


def _places(options: RotaryOptions, count: int, axis: int) -> Tensor:
    index = torch.arange(count, dtype=torch.float32, device="cpu")
    if options.places == "centered":
        return (2 * (index + 0.5) / count - 1) * 2 * pi
    scale = 1 if options.reference_grid is None else options.reference_grid[axis] / count
    return (index + options.offset) * scale


def _bands(options: RotaryOptions, head_dim: int, device: torch.device) -> Tensor:
    """Frequencies from 1 down to 1 / temperature, (K / 4,)."""
    index = torch.arange(head_dim // 4, dtype=torch.float32, device=device)
    return options.temperature ** -(index / (head_dim // 4))
