"""Notices a training loss that rises, so that a run from good weights is not spoilt by its own rate."""

import math
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from vitral.runtime.world import ALONE, World

# Fewer steps say little: the losses of single batches differ by a third of their mean.
_LEAST_STEPS = 8
# A rise counts if it is this many standard errors, and this share of the loss.
_STANDARD_ERRORS = 4.0
_SHARE = 0.5


@dataclass(frozen=True)
class Window:
    """The mean loss of some steps."""

    mean: float
    squared_error: float  # of the mean

    def rose_from(self, other: "Window") -> bool:
        if not math.isfinite(self.mean):
            return True
        rise = self.mean - other.mean
        noise = math.sqrt(self.squared_error + other.squared_error)
        return rise > _STANDARD_ERRORS * noise and rise > _SHARE * abs(other.mean)


class LossWatch:
    """Compares the mean loss of each window of steps with the lowest before it.

    Args:
        steps_per_epoch: a window is a quarter of them, and a few steps at least.
        device: where losses are; they are read once a window only.
        parts: of each batch, whose losses are added up when they are read.
        world: the processes that share them.
    """

    def __init__(
        self, steps_per_epoch: int, device: torch.device, parts: int = 1, world: World = ALONE
    ) -> None:
        self.window = max(steps_per_epoch // 4, _LEAST_STEPS)
        self.lowest: Window | None = None
        self.latest: Window | None = None
        self._world, self._mine = world, world.share(parts)
        self._losses_WP = torch.zeros(self.window, parts, device=device)
        self._count = 0

    def add(self, *losses: Tensor) -> None:
        """Takes the losses of this process's parts of a step, scalars that add up to the step's."""
        for part, loss in zip(self._mine, losses, strict=True):
            self._losses_WP[self._count, part] = loss
        self._count += 1

    @property
    def is_full(self) -> bool:
        return self._count == self.window

    def rose(self) -> bool:
        """Ends a full window; whether its loss is clearly above the lowest window's."""
        losses, self._count = self._all_losses.sum(1), 0
        self.latest = Window(float(losses.mean()), float(losses.var()) / self.window)
        if self.lowest is None:
            self.lowest = self.latest
            return False
        if self.latest.mean < self.lowest.mean:
            self.lowest = self.latest
        return self.latest.rose_from(self.lowest)

    @property
    def _all_losses(self) -> Tensor:
        """Those of all processes; each has 0 where another has a number. Every process asks."""
        return self._world.sum_tensor(self._losses_WP).double().cpu()

    def state_dict(self) -> dict[str, Any]:
        """Gives what it holds, of all processes: a number a step, or one a part. Every process asks."""
        lowest = [self.lowest.mean, self.lowest.squared_error] if self.lowest else None
        losses = self._all_losses[: self._count]
        return {"losses": (losses[:, 0] if losses.shape[1] == 1 else losses).tolist(), "lowest": lowest}

    def load_state_dict(self, state: dict[str, Any]) -> Self:
        """Goes on where another left off; from nothing, or with more losses than a window, begins anew."""
        losses = state.get("losses", [])
        self._count = len(losses) if len(losses) < self.window else 0
        mine = slice(self._mine.start, self._mine.stop)
        saved = torch.tensor(losses[: self._count]).reshape(self._count, self._losses_WP.shape[1])
        self._losses_WP[: self._count, mine] = saved[:, mine].to(self._losses_WP)
        self.lowest = Window(*state["lowest"]) if state.get("lowest") else None
        return self
