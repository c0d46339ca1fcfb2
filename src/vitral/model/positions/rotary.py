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
        places = self.places(grid, self.frequencies.device)
        return _cosines_and_sines(self._mixed_angles(places), self.options)

    def _mixed_angles(self, places_BT2: Tensor) -> Tensor:
        """(T, 2) -> (A, T, K / 2), or (B, T, 2) -> (B, A, T, K / 2)."""
        assert self.frequencies is not None
        first, second = places_BT2.unsqueeze(-3).split(1, dim=-1)
        by_first, by_second = self.frequencies.float()[:, :, None]
        return first * by_first + second * by_second

    def places(self, grid: Grid, device: torch.device) -> Tensor:
        """Two coordinates of each token, (T, 2), the first ones 0: by those a token does not turn."""
        return _places_of_tokens(self.options, self.num_prefix_tokens, grid, device)

    def rotation(self, places_BT2: Tensor) -> Rotation:
        """Turns tokens that are anywhere, as those are that merged: (B, 1 or A, T, K)."""
        if self.frequencies is None:
            angles = _axial_angles(self.options, self.head_dim, places_BT2).unsqueeze(-3)
        else:
            angles = self._mixed_angles(places_BT2)
        cos, sin = _cosines_and_sines(angles, self.options).unbind()
        return Rotation(cos, sin, self.options.halves)


@computed_once
def _axial(
    options: RotaryOptions, head_dim: int, num_prefix_tokens: int, grid: Grid, device: torch.device
) -> Tensor:
    """Cosines and sines, (2, T, K)."""
    places = _places_of_tokens(options, num_prefix_tokens, grid, device)
    return _cosines_and_sines(_axial_angles(options, head_dim, places), options)


def _axial_angles(options: RotaryOptions, head_dim: int, places_BT2: Tensor) -> Tensor:
    """(..., T, 2) -> (..., T, K / 2): half by the first coordinate, half by the second."""
    bands = _bands(options, head_dim, places_BT2.device)
    return (places_BT2[..., None] * bands).flatten(-2)


def _cosines_and_sines(angles: Tensor, options: RotaryOptions) -> Tensor:
    """Of each channel: (..., T, K / 2) -> (2, ..., T, K)."""
    # Both channels of a pair turn alike.
    angles = torch.cat([angles, angles], -1) if options.halves else angles.repeat_interleave(2, -1)
    return torch.stack([angles.cos(), angles.sin()])


def _places_of_tokens(
    options: RotaryOptions, num_prefix_tokens: int, grid: Grid, device: torch.device
) -> Tensor:
    """(T, 2), the tokens before the patches at 0."""
    places_N2 = torch.stack(_coordinates(options, grid, device), dim=-1)
    return F.pad(places_N2, (0, 0, num_prefix_tokens, 0))


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
