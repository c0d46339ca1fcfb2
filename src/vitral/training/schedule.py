"""The course of the learning rate: a linear rise, then one of four schedules."""

import math
from collections.abc import Callable
from dataclasses import dataclass

from vitral.recipes.schema import ScheduleName


@dataclass(frozen=True)
class Schedule:
    """The learning rate over the budget of a run.

    "cosine": half a cosine (arXiv:1608.03983); "linear": a straight line; "wsd", warm-up, stable, decay
    (arXiv:2404.06395): level, then a line over the last `decay` of the budget; "constant": level. They
    fall to `final_share` of the peak.
    """

    name: ScheduleName
    peak: float  # learning rate
    warmup: float = 0.0  # share of the budget over which the rate rises from 0
    decay: float = 0.2  # of "wsd"
    final_share: float = 0.0

    def at(self, progress: float) -> float:
        """The rate when the share `progress` of the budget is spent."""
        if progress < self.warmup:
            # From the second step's rate on; at exactly 0 the first batch would teach nothing.
            return self.peak * max(progress / self.warmup, 1e-3)
        spent = (progress - self.warmup) / (1 - self.warmup)
        fallen = _COURSES[self.name](spent, progress, self.decay)
        return self.peak * (self.final_share + (1 - self.final_share) * fallen)


_COURSES: dict[ScheduleName, Callable[[float, float, float], float]] = {
    "cosine": lambda spent, _, __: (1 + math.cos(math.pi * spent)) / 2,
    "linear": lambda spent, _, __: 1 - spent,
    "wsd": lambda _, progress, decay: min((1 - progress) / decay, 1.0) if decay else 1.0,
    "constant": lambda _, __, ___: 1.0,
}


def scaled_rate(rate: float, batch_size: int, meant_for: int) -> float:
    """The rate for a batch of `batch_size`, where it was meant for another; 0: for any.

    Linear scaling (Goyal et al., arXiv:1706.02677, §2.1), as DeiT, MAE and BEiT do.
    """
    return rate * batch_size / meant_for if meant_for else rate
