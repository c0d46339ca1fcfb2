"""Tables of positions that are added to tokens, fixed or learned, at any grid of patches."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vitral.model import initialize
from vitral.model.config import Grid, Resize
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
    """On the CPU whatever device a model is built on: MPS has no float64, and no file fills a meta table."""
    return torch.arange(count, device="cpu")


def sinusoidal_table_2d(grid: tuple[int, int], embed_dim: int) -> Tensor:
    """Row-major (rows * columns, D): half the channels encode the row, the other half the column."""
    if embed_dim % 4:
        raise ValueError(f"2-D sine/cosine positions need embed_dim % 4 == 0; it is {embed_dim}")
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
            raise ValueError(f"the sequence has {length} tokens; this encoding has {max_len}")
        return tokens_BND + self.table[:length].to(tokens_BND.device)


class SinusoidalPositions(PositionalEncoding):
    """`PositionalEncoding` of all tokens in a row, whatever the grid."""

    def forward(self, tokens_BND: Tensor, grid: Grid | None = None) -> Tensor:  # noqa: ARG002 - as others
        length, (max_len, embed_dim) = tokens_BND.shape[1], self.table.shape
        if length <= max_len:
            return super().forward(tokens_BND)
        return tokens_BND + sinusoidal_table(places_on_cpu(length), embed_dim).to(tokens_BND)


class PositionalEncoding2d(nn.Module):
    """Adds fixed 2-D sine/cosine encodings to the patches; the `prefix` tokens before them get none.

    (B, T, D) -> (B, T, D), as in MAE (arXiv:2111.06377) but for the order of channels.
    """

    table: Tensor

    def __init__(self, embed_dim: int, grid: Grid, *, prefix: int) -> None:
        super().__init__()
        self.grid, self.prefix = grid, prefix
        self.register_buffer("table", self._table(grid, embed_dim), persistent=False)

    def forward(self, tokens_BTD: Tensor, grid: Grid | None = None) -> Tensor:
        same = grid is None or grid == self.grid
        table_TD = self.table if same else self._table(grid, tokens_BTD.shape[2]).to(self.table)
        return tokens_BTD + table_TD.to(tokens_BTD.device)

    def _table(self, grid: Grid, embed_dim: int) -> Tensor:
        return F.pad(sinusoidal_table_2d(grid, embed_dim), (0, 0, self.prefix, 0))


class LearnedPositions(nn.Module):
    """Adds a learned vector to each token, the paper's E_pos in eq. 1: (B, T, D) -> (B, T, D).

    Args:
        embed_dim: D.
        grid: rows and columns of patches that the table has vectors for; at another grid they are resized.
        prefix: how many of the tokens before the patches have vectors, from the first.
        without: how many more tokens stand before the patches, and have none.
        resize: the rule for another grid.
    """

    def __init__(self, embed_dim: int, grid: Grid, prefix: int, without: int, resize: Resize) -> None:
        super().__init__()
        self.grid, self.prefix, self.without, self.resize = grid, prefix, without, resize
        self.table = nn.Parameter(torch.empty(prefix + grid[0] * grid[1], embed_dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        initialize.truncated_normal(self.table)

    def forward(self, tokens_BTD: Tensor, grid: Grid | None = None) -> Tensor:
        return tokens_BTD + self.at(grid or self.grid)

    def at(self, grid: Grid) -> Tensor:
        """What is added to each token, (T, D), for another grid of patches."""
        table = self.resized(grid)
        if not self.without:
            return table
        none = table.new_zeros(self.without, table.shape[1])
        return torch.cat([table[: self.prefix], none, table[self.prefix :]])

    def resized(self, grid: Grid) -> Tensor:
        """The table for another grid of patches."""
        if grid == self.grid:
            return self.table
        prefix, patches = self.table[: self.prefix], self.table[self.prefix :]
        return torch.cat([prefix, resize_grid(patches, self.grid, grid, self.resize)])


class NoPositions(nn.Module):
    """Tokens as they are; attention may know their places (`positions.Relation`)."""

    def forward(self, tokens_BTD: Tensor, grid: Grid | None = None) -> Tensor:  # noqa: ARG002 - as others
        return tokens_BTD
