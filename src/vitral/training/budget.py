"""How much of its budget a run has spent, and what is due."""

import math
import time

from vitral.recipes.schema import Course, Limits
from vitral.training.state import RunState

# Of a budget in minutes, for all evaluations together.
_EVALUATIONS_SHARE = 0.1
# Steps that are no measure of time: models are compiled in them.
_STARTING_STEPS = 3


class Budget:
    """Steps and time of a run, against its limits.

    Args:
        limits: the first that is reached ends the run.
        course: how often to evaluate and to save.
        steps_per_epoch: of the training images.
        state: of the run; its `seconds` go on from where they stand.
    """

    def __init__(self, limits: Limits, course: Course, steps_per_epoch: int, state: RunState) -> None:
        self.limits, self.course, self.steps_per_epoch, self.state = limits, course, steps_per_epoch, state
        self.evaluation_seconds, self.evaluated_at = 0.0, 0.0
        self._resumed_at, self._earlier_seconds = time.monotonic(), state.seconds

    def take_up(self, state: RunState) -> None:
        """Go on from the state of an earlier session."""
        self.state, self._earlier_seconds = state, state.seconds

    def spend(self, seconds: float) -> None:
        """Count time that was spent on the run before it began."""
        self._earlier_seconds += seconds
        self.tick()

    def clock(self) -> float:
        """Read the seconds that the run has taken, by the clock of this process."""
        return self._earlier_seconds + time.monotonic() - self._resumed_at

    def tick(self, seconds: float | None = None) -> None:
        """Let time go on: to `seconds`, or by this process's clock."""
        self.state.seconds = self.clock() if seconds is None else seconds
        if self.limits.timed and self.state.step <= _STARTING_STEPS:  # compiling, where there is any
            self.state.start_seconds = min(self.state.seconds, 30 * self.limits.minutes)

    @property
    def epoch(self) -> float:
        return self.state.step / self.steps_per_epoch

    @property
    def total_steps(self) -> int | None:
        """The budget in steps; None if only time limits it."""
        steps = min(self.limits.steps, self.limits.epochs * self.steps_per_epoch)
        return max(round(steps), 1) if math.isfinite(steps) else None

    @property
    def progress(self) -> float:
        """The share of the budget that is spent, 0 to 1."""
        shares = []
        if self.total_steps:
            shares.append(self.state.step / self.total_steps)
        if self.limits.timed:
            start = self.state.start_seconds
            shares.append((self.state.seconds - start) / max(60 * self.limits.minutes - start, 1e-9))
        return min(max(shares), 1.0)

    @property
    def is_spent(self) -> bool:
        return self.progress >= 1

    @property
    def evaluation_is_due(self) -> bool:
        """At the end of an epoch; where time is the budget, evaluations take a tenth of it at most."""
        if self.state.step % (self.course.eval_epochs * self.steps_per_epoch):
            return False
        since = self.state.seconds - self.evaluated_at
        return not self.limits.timed or since >= self.evaluation_seconds / _EVALUATIONS_SHARE

    @property
    def checkpoint_is_due(self) -> bool:
        return self.state.step % (self.course.checkpoint_steps or self.steps_per_epoch) == 0
