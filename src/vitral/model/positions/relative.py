"""Relative biases: a learned addition to attention for each distance of two patches."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vitral.model import initialize
from vitral.model.config import Grid, RelativeStart, Resize
from vitral.model.kernels import HasKernels
from vitral.model.positions.kept import KeepsLearned, computed_once, same_grid
from vitral.model.positions.relation import Relation
from vitral.model.positions.resize import resize_grid


class RelativeBias(KeepsLearned, HasKernels):
    """A learned addition to each head's attention logits for each distance of two patches.

    BEiT (arXiv:2106.08254) after Swin. The last three rows of the table (M, A) are for the class
    token: to a patch, from a patch, to itself.

    Args:
        grid: rows and columns of patches.
        num_heads: A.
        resize: rule for the table at another image size.
        start: "zero", BEiT's, or "local": each head begins by looking at one neighbour of every patch
            (`initialize.local_bias`), the locality that few images cannot teach.

    Raises:
        ValueError: if heads are to begin at neighbours, and are more than those.
    """

    down: Tensor
    across: Tensor

    def __init__(self, grid: Grid, num_heads: int, resize: Resize, start: RelativeStart = "zero") -> None:
        super().__init__()
        self.grid, self.resize, self.start = grid, resize, start
        self.table = nn.Parameter(torch.empty((2 * grid[0] - 1) * (2 * grid[1] - 1) + 3, num_heads))
        # On the model's device, for a pass that copies to a GPU waits for it.
        for name, side in zip(("down", "across"), grid, strict=True):
            self.register_buffer(name, _differences(side, torch.device("cpu")), persistent=False)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        self.table.zero_()
        if self.start == "local":
            self.table[:-3] = initialize.local_bias(self.grid, self.table.shape[1])

    def forward(self, grid: Grid, device: torch.device) -> Relation:  # noqa: ARG002 - as rotary positions
        make = self.by_products if self.kernels.relative_bias == "products" else self.by_index
        return Relation(bias_ATT=self.made_once(self.table, make, grid))

    def by_index(self, grid: Grid) -> Tensor:
        """Each pair's row of the table, (A, T, T)."""
        table_MA = self.resized(grid)
        return table_MA[_distances(grid, table_MA.device)].permute(2, 0, 1)

    def by_products(self, grid: Grid) -> Tensor:
        """The same, exactly, by products with selections: of rows, then of columns."""
        table_MA = self.resized(grid)
        if grid == self.grid:
            down, across = self.down, self.across
        else:
            down, across = (_differences(side, table_MA.device) for side in grid)
        down, across = down.to(table_MA), across.to(table_MA)
        with torch.autocast(table_MA.device.type, enabled=False):
            table_YXA = table_MA[:-3].unflatten(0, (down.shape[2], across.shape[2]))
            rows_IJXA = torch.einsum("ijy,yxa->ijxa", down, table_YXA)
            bias_AIKJL = torch.einsum("klx,ijxa->aikjl", across, rows_IJXA)
        patches_ANN = bias_AIKJL.flatten(3).flatten(1, 2)
        count = patches_ANN.shape[1]
        to_patch, from_patch, itself = table_MA[-3:, :, None, None]
        class_A1T = torch.cat([itself, to_patch.expand(-1, -1, count)], dim=2)
        others_ANT = torch.cat([from_patch.expand(-1, count, -1), patches_ANN], dim=2)
        return torch.cat([class_A1T, others_ANT], dim=1)

    def resized(self, grid: Grid) -> Tensor:
        """The table, (M, A), for another grid of patches."""
        old, new = ((2 * rows - 1, 2 * columns - 1) for rows, columns in (self.grid, grid))
        if same_grid(old, new):
            return self.table
        patches, class_token = self.table[:-3], self.table[-3:]
        return torch.cat([resize_grid(patches, old, new, self.resize), class_token])


@computed_once
def _distances(grid: Grid, device: torch.device) -> Tensor:
    """(T, T): the row of the table for each pair of tokens, the class token first."""
    rows, columns = grid
    places = torch.meshgrid(*(torch.arange(side, device=device) for side in grid), indexing="ij")
    row, column = (place.flatten() for place in places)
    down = row[:, None] - row + rows - 1
    across = column[:, None] - column + columns - 1
    between = F.pad(down * (2 * columns - 1) + across, (1, 0, 1, 0))
    count = (2 * rows - 1) * (2 * columns - 1)
    between[0, :], between[:, 0], between[0, 0] = count, count + 1, count + 2
    return between


@computed_once
def _differences(side: int, device: torch.device) -> Tensor:
    """(side, side, 2 side - 1): 1 where one place less another is the third, counted from 1 - side."""
    places = torch.arange(side, device=device)
    distances = torch.arange(1 - side, side, device=device)
    return (places[:, None, None] - places[:, None] == distances).float()
