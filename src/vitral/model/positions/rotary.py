"""Rotary positions in two dimensions: queries and keys turn by angles that depend on their places."""

from math import pi

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vitral.model import initialize
from vitral.model.config import Grid, RotaryOptions
from vitral.model.positions.kept import KeepsLearned, computed_once
from vitral.model.positions.relation import Relation, Rotation


class RotaryPositions(KeepsLearned):
    """Rotary positions of the patches; the tokens before them do not turn.

    Raises:
        ValueError: if the head's width is no multiple of four.
    """

    def __init__(self, head_dim: int, num_heads: int, num_prefix_tokens: int, options: RotaryOptions) -> None:
        super().__init__()
        if head_dim % 4:
            raise ValueError(
                f"a head is {head_dim} channels wide; for rotary positions it must be a multiple of 4"
            )
        self.head_dim, self.num_prefix_tokens, self.options = head_dim, num_prefix_tokens, options
        # Of the first and the second coordinate, for each head and pair of channels.
        shape = (2, num_heads, head_dim // 2)
        self.frequencies = nn.Parameter(torch.empty(shape)) if options.kind == "mixed" else None
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        if self.frequencies is not None:
            bands = _bands(self.options, self.head_dim, self.frequencies.device)
            self.frequencies.copy_(initialize.turned_frequencies(bands, self.frequencies.shape[1]))

    def forward(self, grid: Grid, device: torch.device) -> Relation:
        """Gives each token's cosines and sines, (T, K), or (A, T, K) where frequencies are learned."""
        if self.frequencies is None:
            turned = _axial(self.options, self.head_dim, self.num_prefix_tokens, grid, device)
        else:
            turned = self.made_once(self.frequencies, self.mixed, grid)
        cos, sin = turned.unbind()
        return Relation(Rotation(cos, sin, self.options.halves))

    def mixed(self, grid: Grid) -> Tensor:
        """Cosines and sines of the learned frequencies, (2, A, T, K)."""
        assert self.frequencies is not None
        first, second = _coordinates(self.options, grid, self.frequencies.device)
        by_first, by_second = self.frequencies.float()[:, :, None]
        angles = first[:, None] * by_first + second[:, None] * by_second
        return _cosines_and_sines(angles, self.num_prefix_tokens, self.options)


@computed_once
def _axial(
    options: RotaryOptions, head_dim: int, num_prefix_tokens: int, grid: Grid, device: torch.device
) -> Tensor:
    """Cosines and sines, (2, T, K)."""
    first, second = _coordinates(options, grid, device)
    bands = _bands(options, head_dim, device)
    angles = torch.cat([first[:, None] * bands, second[:, None] * bands], dim=-1)
    return _cosines_and_sines(angles, num_prefix_tokens, options)


def _cosines_and_sines(angles: Tensor, num_prefix_tokens: int, options: RotaryOptions) -> Tensor:
    """Of each channel, after tokens that do not turn: (..., N, K / 2) -> (2, ..., T, K)."""
    angles = F.pad(angles, (0, 0, num_prefix_tokens, 0))
    # Both channels of a pair turn alike.
    angles = torch.cat([angles, angles], -1) if options.halves else angles.repeat_interleave(2, -1)
    return torch.stack([angles.cos(), angles.sin()])


def _coordinates(options: RotaryOptions, grid: Grid, device: torch.device) -> tuple[Tensor, Tensor]:
    """Two coordinates of each patch, (N,) each."""
    axes = [_places(options, count, axis, device) for axis, count in enumerate(grid)]
    rows, columns = (places.flatten() for places in torch.meshgrid(*axes, indexing="ij"))
    return (columns, rows) if options.column_first else (rows, columns)


def _places(options: RotaryOptions, count: int, axis: int, device: torch.device) -> Tensor:
    index = torch.arange(count, dtype=torch.float32, device=device)
    if options.places == "centered":
        return (2 * (index + 0.5) / count - 1) * 2 * pi
    scale = 1 if options.reference_grid is None else options.reference_grid[axis] / count
    return (index + options.offset) * scale


def _bands(options: RotaryOptions, head_dim: int, device: torch.device) -> Tensor:
    """Frequencies from 1 down to 1 / temperature, (K / 4,)."""
    index = torch.arange(head_dim // 4, dtype=torch.float32, device=device)
    return options.temperature ** -(index / (head_dim // 4))
