"""How much accuracy a form loses, image by image beside the eager model, and how well it is calibrated."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from vitral.evaluation.analysis.comparison import difference
from vitral.evaluation.calibration import LEAST_IMAGES, fit_temperature
from vitral.evaluation.evaluation import Evaluation
from vitral.evaluation.outcomes import Outcomes
from vitral.evaluation.task import Task

# A form of the same function gives logits this near, relative to the largest; only ties answer otherwise.
SAME_LOGITS = 1e-3
MAX_CALIBRATION_LOSS = 0.01  # of expected calibration error, beside the eager model's
_Z = 1.959964  # of a 95 % interval


@dataclass(frozen=True)
class Judgement:
    """What became of a form's answers, beside those of the eager model on the same images."""

    n: int
    score: float  # top-1, or the mean average precision of several labels an image
    loss: float  # share of the images that it loses: the eager model's right ones less its own
    loss_low: float  # of a 95 % interval (Agresti and Min, 2005)
    loss_high: float
    agreement: float  # share of the images with the same answer
    same_numbers: bool  # whether all logits are the eager model's but for rounding
    ece: float | None  # at the temperature; None of several labels an image
    temperature: float

    def too_lossy(self, max_drop: float, eager: "Judgement") -> str | None:
        """Say why a form is refused; None if it may be taken.

        Args:
            max_drop: the largest loss, as a share, that the upper bound may reach.
            eager: of the eager model.
        """
        if not (self.same_numbers and self.loss == 0) and self.loss_high > max_drop:
            told = (
                f"it loses {100 * self.loss:.2f} points, at most {100 * self.loss_high:.2f} (95 %), and may "
                f"lose {100 * max_drop:g}"
            )
            if self.loss >= max_drop:
                return told
            return f"{told}; {self.images_needed(max_drop):,} held-out images might show that it does not"
        if self.ece is not None and eager.ece is not None and self.ece > eager.ece + MAX_CALIBRATION_LOSS:
            return (
                f"its calibration error is {self.ece:.1%}, the eager model's {eager.ece:.1%}, and it may be "
                f"{MAX_CALIBRATION_LOSS:.0%} more"
            )
        return None

    def images_needed(self, max_drop: float) -> int:
        """So many images would bring the upper bound to `max_drop`, if the share of changed ones stays."""
        reach = self.loss_high - self.loss
        times = (reach / (max_drop - self.loss)) ** 2
        return math.ceil(1.02 * times * self.n / 10) * 10


def judge(
    task: Task,
    classes: Sequence[str],
    labels: np.ndarray,
    eager_BL: np.ndarray,
    logits_BL: np.ndarray,
    temperature: float,
    eager_temperature: float,
) -> Judgement:
    """Compare a form's logits with the eager model's, (n, L) each, on images with these labels."""
    ours, judged = _outcomes(task, eager_BL, labels, eager_temperature), None
    theirs = _outcomes(task, logits_BL, labels, temperature)
    judged = difference(~ours.wrong, ~theirs.wrong)
    evaluation: Evaluation = task.evaluation.of(theirs, classes)
    same = ours.answers == theirs.answers
    return Judgement(
        n=len(labels),
        score=evaluation.score,
        loss=-judged.value,
        loss_low=-judged.high,
        loss_high=-judged.low,
        agreement=float((same if same.ndim == 1 else same.all(1)).mean()),
        same_numbers=bool(np.abs(eager_BL - logits_BL).max() <= SAME_LOGITS * np.abs(eager_BL).max()),
        ece=getattr(evaluation, "ece") if task.calibrates else None,  # noqa: B009 - of one label alone
        temperature=temperature,
    )


def refitted(task: Task, logits_BL: np.ndarray, labels: np.ndarray, otherwise: float) -> float:
    """Fit the temperature of a form's logits; gives `otherwise` of few images, or if the task has none."""
    if not task.calibrates or len(labels) < LEAST_IMAGES:
        return otherwise
    return fit_temperature(torch.from_numpy(logits_BL), torch.from_numpy(labels))


def least_images(max_drop: float) -> int:
    """So many images are needed for the bound even if a form answers all of them alike."""
    return math.ceil(_Z / max_drop) if max_drop else 0


def _outcomes(task: Task, logits_BL: np.ndarray, labels: np.ndarray, temperature: float) -> Outcomes:
    answers_BL = task.log_probabilities(torch.from_numpy(logits_BL) / temperature)
    return task.outcomes.of(answers_BL, torch.from_numpy(labels))
