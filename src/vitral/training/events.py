"""What a run tells of its course, in small records; whoever wants to know is a listener.

A listener is a function of one event: the console, the file of metrics, a tracker, a notebook.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from vitral.evaluation.evaluation import Evaluation
from vitral.training.listeners import Message, Progress
from vitral.training.run import Run
from vitral.training.step import RunningMean


@dataclass(frozen=True)
class RunBegins:
    """All is accepted, and nothing is computed yet; the run is to be looked at, not changed."""

    run: Run


@dataclass(frozen=True)
class StepDone:
    """One update of the weights."""

    step: int  # that are done
    epoch: float
    progress: float  # share of the budget that is spent
    seconds: float
    training: RunningMean  # since the last evaluation


@dataclass(frozen=True)
class Evaluated:
    """The averaged weights were judged on the validation images; at step 0 the start is."""

    step: int
    epoch: float
    seconds: float
    training: RunningMean
    evaluation: Evaluation
    learning_rate: float
    is_best: bool
    time: Mapping[str, float] = field(default_factory=dict)  # seconds by part so far, as `Clock.record`

    def record(self) -> dict[str, Any]:
        """Give the line of ``metrics.jsonl``."""
        return {
            "step": self.step,
            "epoch": self.epoch,
            "seconds": round(self.seconds, 3),
            "train_loss": self.training.loss if self.step else None,
            "train_accuracy": self.training.accuracy if self.step else None,
            "val_loss": self.evaluation.loss,
            **{f"val_{name}": value for name, value in self.evaluation.metrics.items()},
            "learning_rate": self.learning_rate,
            "time": dict(self.time),
        }


@dataclass(frozen=True)
class RunEnds:
    """No further step is taken; what follows is the last evaluation."""

    step: int


@dataclass(frozen=True)
class CheckpointWritten:
    """All that a resume needs is on disk; what was told up to this step is not computed again."""

    step: int


Event = Message | Progress | RunBegins | StepDone | Evaluated | CheckpointWritten | RunEnds
Listener = Callable[[Event], None]
