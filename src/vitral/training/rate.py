"""A learning-rate range test (Smith, arXiv:1506.01186): the rate grows with every step.

Which point of the curve to take no theory says. On the digits the rate of the steepest fall did as well as
the recipe's own, and the middle of the longest fall much worse (docs/log.md, 2026-11-27).
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from vitral.data.image_data import DataSource, ImageData, open_data
from vitral.recipes.recipe import Recipe
from vitral.runtime.errors import VitralError
from vitral.runtime.stopping import StopSignal
from vitral.runtime.threads import computing_threads, thread_count
from vitral.training.begin import begin
from vitral.training.choose import AUTO
from vitral.training.determinism import deterministic
from vitral.training.listeners import Listeners, Message
from vitral.training.loop import training_batches
from vitral.training.memory import advice_when_out_of_memory
from vitral.training.parts import OURS
from vitral.training.run import Run
from vitral.training.run_folder import RunFolder
from vitral.training.start import start_head

LOWEST, HIGHEST = 1e-6, 10.0  # of the setting learning_rate
# What makes one batch's loss differ from the next one's is off, and the rate follows the test alone.
_PLAIN: dict[str, Any] = {
    "crop": "none", "flip": False, "rand_augment": 0.0, "three_augment": False, "color_jitter": 0.0,
    "erasing": 0.0, "mixup": 0.0, "cutmix": 0.0, "small_images": 0.0, "schedule": "constant", "warmup": 0.0,
    "compile": False, "track": None,
}  # fmt: skip
_MEMORY = 0.1  # of the steps, that the mean loss goes back over
_DIVERGED = 4.0  # times the least mean loss
# Two rates within this factor are one: four seeds moved the steepest fall by 2.3 (docs/log.md, 2026-11-27).
_ALIKE = 3.0


@dataclass(frozen=True)
class RateTest:
    """The loss at rates that grow, of N steps.

    Args:
        rates: of each step (N,), as the setting `learning_rate` has them.
        losses: of each step's batch (N,).
        planned: how many steps it was to take; it ends early where the loss is lost.
        recipes_own: the rate that a run of the recipe would take.
    """

    rates: np.ndarray
    losses: np.ndarray
    planned: int
    recipes_own: float

    @property
    def memory(self) -> int:
        """Steps that the mean loss goes back over."""
        return _memory(self.planned)

    @property
    def means(self) -> np.ndarray:
        """The mean loss of the last steps (N,), weighted by how recent they are."""
        return _means(self.losses, self.memory)

    @property
    def level(self) -> float:
        """The mean loss of the first tenth, whose rates teach next to nothing."""
        return float(self.means[min(self.memory, len(self.rates)) - 1])

    @property
    def diverged(self) -> bool:
        return bool(self.rates[-1] < HIGHEST)

    @property
    def steepest(self) -> int | None:
        """The step where the mean loss falls most steeply; None if it falls no more than batches differ."""
        first, means = self.memory, self.means
        last = int(means.argmin())
        if last - first < 2 or self.level - means[last] <= self.losses[: 2 * first].std():
            return None
        return first + int(np.gradient(means, np.log(self.rates))[first : last + 1].argmin())

    @property
    def suggestion(self) -> float | None:
        """The rate of the steepest fall, to two digits."""
        return None if self.steepest is None else float(f"{self.rates[self.steepest]:.2g}")

    @property
    def alike(self) -> bool:
        """Whether what is suggested and the recipe's own are the same, as far as such a test can tell."""
        rate = self.suggestion
        return rate is not None and abs(math.log(rate / self.recipes_own)) <= math.log(_ALIKE)

    def conclusion(self) -> str:
        """Say what it comes to, in a line or two."""
        own = f"learning_rate={self.recipes_own:.3g}"
        if self.suggestion is None:
            return (
                f"nothing to suggest: the loss falls no more than batches differ; the recipe's own is {own}"
            )
        words = f"learning_rate={self.suggestion:g}"
        if self.alike:
            return f"{words} may do, and so may the recipe's own {own}: the test cannot tell them apart"
        return f"{words} may do better than the recipe's own {own}: a short run of each can tell"

    def to_dict(self) -> dict[str, Any]:
        """Give all of it, as JSON takes it."""
        columns = zip(self.rates.tolist(), self.losses.tolist(), self.means.tolist(), strict=True)
        return {
            "suggestion": self.suggestion,
            "recipe": self.recipes_own,
            "alike": self.alike,
            "planned": self.planned,
            "diverged": self.diverged,
            "steps": [{"learning_rate": rate, "loss": loss, "mean": mean} for rate, loss, mean in columns],
        }


def find_rate(
    data: DataSource,
    recipe: Recipe,
    steps: int = 100,
    *,
    tell: Callable[[str], None] = lambda _: None,
    on_steps: Callable[[int, int], None] = lambda *_: None,
) -> RateTest:
    """Take steps at learning rates that grow from `LOWEST` to `HIGHEST`; nothing of the model is kept.

    Args:
        data: as `train` takes it.
        recipe: of the run that the rate is for; what alters or mixes its images is left out.
        steps: at most; fewer where the loss is lost before.
        tell: told in lines of what a person should know.
        on_steps: told how many steps of how many are done.

    Raises:
        VitralError: if the settings or the data cannot be used, or the loss is lost in the first steps.
    """
    if recipe.get("model") == AUTO:
        raise VitralError("model=auto tries several models; name the one whose learning rate you look for")
    images = open_data(data, **recipe.opening)
    with deterministic(), computing_threads(thread_count(recipe.get("threads"))):
        run = _begun(images, recipe, tell)
        with advice_when_out_of_memory(run.images_at_a_time):
            found = list(_losses(run, np.geomspace(LOWEST, HIGHEST, steps), on_steps))
    if len(found) < 2:
        raise VitralError("the loss is lost in the first steps, at the least rates; look at the data")
    rates, losses = np.array(found).T
    return RateTest(rates, losses, steps, run.recipe.rate.learning_rate)


def _begun(images: ImageData, recipe: Recipe, tell: Callable[[str], None]) -> Run:
    """A run whose folder is never made: that happens only where steps are to be kept."""

    def listen(event: object) -> None:
        if isinstance(event, Message):
            tell(event.text)

    run = begin(images, RunFolder(Path("rate-test")), recipe.changed(**_PLAIN), Listeners(listen), OURS)
    if run.is_tuning and run.recipe.tuning.probe_head:
        start_head(run)
    return run


def _losses(
    run: Run, rates: np.ndarray, on_steps: Callable[[int, int], None]
) -> Iterator[tuple[float, float]]:
    """Each step's rate and its loss before the update, until the loss is lost."""
    losses: list[float] = []
    memory = _memory(len(rates))
    with closing(training_batches(run)) as batches:
        for rate in rates.tolist():
            parts = list(islice(batches, len(run.mine)))
            run.state.rate_share = rate / run.recipe.rate.learning_rate
            if sound := run.meet(parts, StopSignal()):  # signals end all of it
                losses.append(float(sum(run.step(*parts, sound=sound))))
                means = _means(losses, memory)
                if not math.isfinite(losses[-1]) or means[-1] > _DIVERGED * means.min():
                    return
                yield rate, losses[-1]
            run.state.step += 1
            on_steps(run.state.step, len(rates))


def _memory(steps: int) -> int:
    return max(round(_MEMORY * steps), 2)


def _means(losses: Sequence[float] | np.ndarray, memory: int) -> np.ndarray:
    """The exponential means of losses (N,), not drawn to 0 at their start (Adam's, arXiv:1412.6980, §3)."""
    kept, mean, means = 1 - 1 / memory, 0.0, []
    for step, loss in enumerate(losses, 1):
        mean = kept * mean + (1 - kept) * float(loss)
        means.append(mean / (1 - kept**step))
    return np.array(means)
