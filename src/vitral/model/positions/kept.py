"""Tables of a grid, computed once and not in every pass.

Nothing is kept of a graph that is compiled, exported or captured, whose memory is its own: there a table is
computed inside. Nor is anything kept that belongs to inference mode, for training may need it next.
"""

import functools
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any, Self

import torch
from torch import Tensor, nn

from vitral.model.config import Grid

_MOST = 16  # tables of one kind; a batch of images of any size needs a new one


def recording() -> bool:
    """Whether the operations that run now become part of a graph."""
    return torch.compiler.is_compiling() or (
        torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
    )


def serves_any(grid: Grid | None) -> bool:
    """Whether the graph that is exported now is for any grid, so that no choice may rest on this one."""
    return (
        torch.compiler.is_exporting()
        and grid is not None
        and any(isinstance(side, torch.SymInt) for side in grid)
    )


def same_grid(one: Grid, other: Grid) -> bool:
    """Whether two grids are the same, as far as a graph may know: one for any grid resizes at its own too."""
    return not serves_any(one) and not serves_any(other) and one == other


def computed_once(build: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Lets a function of hashable arguments, the device among them, keep its last tables."""
    kept: OrderedDict[tuple[Hashable, ...], Tensor] = OrderedDict()

    @functools.wraps(build)
    def table(*arguments: Any) -> Tensor:
        if recording():
            return build(*arguments)
        found = kept.get(arguments)
        if found is None:
            found = _outside_of_autograd(build, *arguments)
            if type(found) is Tensor:  # no stand-in of a tracer
                kept[arguments] = found
            if len(kept) > _MOST:
                kept.popitem(last=False)
        return found

    return table


class KeepsLearned(nn.Module):
    """Keeps what was made of a learned table for the last grid, while table and rule stay the same."""

    def __init__(self) -> None:
        super().__init__()
        self._kept: tuple[tuple[Hashable, ...], Tensor] | None = None

    def train(self, mode: bool = True) -> Self:  # noqa: FBT001, FBT002 - as torch has it
        # Optimizers that write through `.data` leave no trace that could be compared.
        self._kept = None
        return super().train(mode)

    def made_once(self, table: Tensor, make: Callable[[Grid], Tensor], grid: Grid) -> Tensor:
        """`make(grid)` of the table, made again where gradients flow into the table or it has changed."""
        learns = table.requires_grad and torch.is_grad_enabled()
        if recording() or learns or table.is_inference():
            return make(grid)
        rule = getattr(self, "resize", None)  # the doctor changes it for a moment
        key = make.__name__, grid, rule, table.data_ptr(), table._version, table.dtype
        kept = self._kept  # read once, for another thread may write
        if kept is None or kept[0] != key:
            kept = self._kept = key, _outside_of_autograd(make, grid)
        return kept[1]


def _outside_of_autograd(make: Callable[..., Tensor], *arguments: Any) -> Tensor:
    with torch.inference_mode(mode=False), torch.no_grad():
        return make(*arguments)
