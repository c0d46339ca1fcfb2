"""Tables of positions that are added to tokens, fixed or learned, at any grid of patches.

`forward` adds to the patches, `of_prefix` to the tokens before them. Axes are those of `embedding`.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vitral.model import initialize
from vitral.model.config import Grid, Resize
from vitral.model.positions.kept import KeepsLearned, computed_once, same_grid, serves_any
from vitral.model.positions.resize import resize_grid


def sinusoidal_table(positions: Tensor, embed_dim: int) -> Tensor:
    """Sine/cosine encodings of real-valued positions, (M,) -> (M, D).

    The 2017 Transformer, §3.5: channel 2i is sin(pos / 10000^(2i/D)), channel 2i + 1 its cosine.
    """
    channels = torch.arange(0, embed_dim, 2, dtype=torch.float64, device=positions.device)
    angles = positions[:, None] * 10_000.0 ** (-channels / embed_dim)
    # An odd width ends on a sine.
    return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1)[:, :embed_dim].float()


def places_on_cpu(count: int) -> Tensor:
    """On the CPU for a model on any device: MPS has no float64, and nothing would fill a table on meta."""
    return torch.arange(count, device="cpu")


def sinusoidal_table_2d(grid: tuple[int, int], embed_dim: int) -> Tensor:
    """Row-major (rows * columns, D): half the channels encode the row, the other half the column."""
    if embed_dim % 4:
        raise ValueError(
            f"embed_dim is {embed_dim}; for 2-D sine/cosine positions it must be a multiple of 4"
        )
    rows, columns = torch.meshgrid(*(places_on_cpu(n) for n in grid), indexing="ij")
    halves = [sinusoidal_table(axis.flatten(), embed_dim // 2) for axis in (rows, columns)]
    return torch.cat(halves, dim=1)


class PositionalEncoding(nn.Module):
    """Adds the fixed sine/cosine encoding of the 2017 Transformer, §3.5: (B, N, D) -> (B, N, D).

    Args:
        embed_dim: D.
        max_len: the longest sequence; shorter ones take the first rows of the table.

    Raises:
        ValueError: if a sequence is longer than `max_len`.
    """

    table: Tensor

    def __init__(self, embed_dim: int, max_len: int) -> None:
        super().__init__()
        table = sinusoidal_table(places_on_cpu(max_len), embed_dim)
        self.register_buffer("table", table, persistent=False)

    def forward(self, tokens_BND: Tensor) -> Tensor:
        length, max_len = tokens_BND.shape[1], self.table.shape[0]
        if length > max_len:
            raise ValueError(f"the sequence has {length} tokens; this encoding takes {max_len} at most")
        return tokens_BND + self.table[:length].to(tokens_BND.device)


class SinusoidalPositions(nn.Module):
    """Adds the encoding of `PositionalEncoding` to all tokens in a row, whatever the grid."""

    table: Tensor

    def __init__(self, embed_dim: int, num_prefix_tokens: int, grid: Grid) -> None:
        super().__init__()
        self.num_prefix_tokens = num_prefix_tokens
        table = sinusoidal_table(places_on_cpu(num_prefix_tokens + grid[0] * grid[1]), embed_dim)
        self.register_buffer("table", table, persistent=False)

    def forward(self, patches_BND: Tensor, grid: Grid | None = None) -> Tensor:
        length = self.num_prefix_tokens + patches_BND.shape[1]
        table, (max_len, embed_dim) = self.table, self.table.shape
        if serves_any(grid) or length > max_len:
            table = _longer_table(length, embed_dim, patches_BND.device)
        return patches_BND + table[self.num_prefix_tokens : length].to(patches_BND.device)

    def of_prefix(self, tokens_1ED: Tensor) -> Tensor:
        return tokens_1ED + self.table[: self.num_prefix_tokens].to(tokens_1ED.device)


@computed_once
def _longer_table(length: int, embed_dim: int, device: torch.device) -> Tensor:
    return sinusoidal_table(places_on_cpu(length), embed_dim).to(device)


class PositionalEncoding2d(nn.Module):
    """Adds fixed 2-D sine/cosine encodings to the patches; the tokens before them get none.

    (B, N, D) -> (B, N, D), as in MAE (arXiv:2111.06377) but for the order of channels.
    """

    table: Tensor

    def __init__(self, embed_dim: int, grid: Grid) -> None:
        super().__init__()
        self.grid = grid
        self.register_buffer("table", sinusoidal_table_2d(grid, embed_dim), persistent=False)

    def forward(self, patches_BND: Tensor, grid: Grid | None = None) -> Tensor:
        if grid is None or same_grid(grid, self.grid):
            return patches_BND + self.table.to(patches_BND.device)
        return patches_BND + _other_table_2d(grid, patches_BND.shape[2], patches_BND.device)

    def of_prefix(self, tokens_1ED: Tensor) -> Tensor:
        return tokens_1ED


@computed_once
def _other_table_2d(grid: Grid, embed_dim: int, device: torch.device) -> Tensor:
    return sinusoidal_table_2d(grid, embed_dim).to(device)


class LearnedPositions(KeepsLearned):
    """Adds a learned vector to each patch, the paper's E_pos in eq. 1: (B, N, D) -> (B, N, D).

    Args:
        embed_dim: D.
        grid: rows and columns of patches that the table has vectors for; at another grid they are resized.
        num_prefix_tokens: how many tokens before the patches, from the first, have vectors too, at the head
            of the table.
        resize: the rule for another grid.
    """

    def __init__(self, embed_dim: int, grid: Grid, num_prefix_tokens: int, resize: Resize) -> None:
        super().__init__()
        self.grid, self.num_prefix_tokens, self.resize = grid, num_prefix_tokens, resize
        self.table = nn.Parameter(torch.empty(num_prefix_tokens + grid[0] * grid[1], embed_dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        initialize.truncated_normal(self.table)

    def forward(self, patches_BND: Tensor, grid: Grid | None = None) -> Tensor:
        grid = grid or self.grid
        table = self.table if same_grid(grid, self.grid) else self.made_once(self.table, self.resized, grid)
        return patches_BND + table[self.num_prefix_tokens :]

    def of_prefix(self, tokens_1ED: Tensor) -> Tensor:
        """Adds the first rows of the table to the tokens before the patches that have rows there."""
        without = tokens_1ED.shape[1] - self.num_prefix_tokens
        return tokens_1ED + F.pad(self.table[: self.num_prefix_tokens], (0, 0, 0, without))

    def resized(self, grid: Grid) -> Tensor:
        """The whole table, (T, D), for another grid of patches."""
        if same_grid(grid, self.grid):
            return self.table
        prefix, patches = self.table[: self.num_prefix_tokens], self.table[self.num_prefix_tokens :]
        return torch.cat([prefix, resize_grid(patches, self.grid, grid, self.resize)])


class NoPositions(nn.Module):
    """Tokens as they are; attention may know their places (`relation.Relation`)."""

    def forward(self, patches_BND: Tensor, grid: Grid | None = None) -> Tensor:  # noqa: ARG002 - as others
        return patches_BND

    def of_prefix(self, tokens_1ED: Tensor) -> Tensor:
        return tokens_1ED
