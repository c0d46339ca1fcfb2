"""What people see of a run while it trains: a live bar, and a plain line for each epoch."""

import math
import sys
import time

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn
from rich.text import Text

from vitral.cli.console import PLAIN_LINE_SECONDS, clock
from vitral.evaluation.evaluation import Evaluation
from vitral.recipes.schema import Resolved
from vitral.runtime.streams import shown, steady
from vitral.training.run import Reporter, Run, schedule_of

# Between two updates of the numbers; reading a loss waits for the device.
_REFRESH_SECONDS = 0.5
# With more, a model from scratch has mostly enough to learn from.
_FEW_PHOTOGRAPHS = 10_000
_TUNING_ADVICE = "few images to begin from scratch with: model=auto minutes=30 may do better"


class TrainingConsole(Reporter):
    """A live bar with loss, accuracy, images per second and time left, and a line for each epoch."""

    def __init__(self) -> None:
        # Losing the terminal is not losing the run, in a program of the user's own too.
        stream = steady(sys.stderr)
        self.console = Console(file=stream, highlight=False, soft_wrap=True, markup=False, emoji=False)
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            _ShareColumn(),
            TextColumn("{task.fields[numbers]}"),
            console=self.console,
            transient=True,
            disable=not self.console.is_terminal,
        )
        self.task = self.progress.add_task("starting", total=1.0, numbers="")
        self.shown_at = time.monotonic()
        self.pace: _Pace | None = None

    def message(self, text: str) -> None:
        self.console.print(f"vitral: {shown(text)}")

    def preparing(self, what: str, done: int, total: int) -> None:
        if self.console.is_terminal:
            self.progress.update(
                self.task, completed=done / total, description=what, numbers=f"{done:,} of {total:,} images"
            )
        elif time.monotonic() - self.shown_at >= PLAIN_LINE_SECONDS / 3:
            self.shown_at = time.monotonic()
            self.console.print(f"{what}: {done:,} of {total:,} images")

    def begin(self, run: Run) -> None:
        self.console.print(run.data.describe())
        self.console.print(describe_recipe(run))
        if run.memory is not None:
            self.console.print(str(run.memory))
        if altered := _how_altered(run):
            self.console.print(f"train's numbers are of images {altered}, val's of images as they are")
        if _had_better_be_tuned(run):
            self.console.print(_TUNING_ADVICE)
        self.progress.start()

    def step(self, run: Run) -> None:
        if self.pace is None:  # what comes before the first step, and compiling in it, are not its pace
            self.pace = _Pace(run)
            return
        interval = _REFRESH_SECONDS if self.console.is_terminal else PLAIN_LINE_SECONDS
        if time.monotonic() - self.shown_at < interval:
            return
        self.shown_at = time.monotonic()
        numbers = (
            f"loss {run.recent.loss:.3f}  {run.recent.accuracy:.1%} right  "
            f"{self.pace.images_per_second(run):,.0f} images/s  {self.pace.left(run)} left"
        )
        if self.console.is_terminal:
            self.progress.update(self.task, completed=run.progress, description=_epoch(run), numbers=numbers)
        else:
            self.console.print(f"{_epoch(run)}  {run.progress:4.0%}  {numbers}")

    def epoch(self, run: Run, evaluation: Evaluation) -> None:
        best = "  best" if run.state.best_step == run.state.step else ""
        self.console.print(
            f"{_epoch(run)}  train loss {run.recent.loss:.3f} {run.recent.accuracy:.1%}  "
            f"val loss {evaluation.loss:.3f} {evaluation.brief}  {clock(run.state.seconds)}{best}"
        )
        self.shown_at = time.monotonic()

    def end(self) -> None:
        self.progress.stop()


def _how_altered(run: Run) -> str:
    """What training does to images that evaluation does not, in a word or two."""
    recipe = run.recipe
    mixed = recipe.mixing.mixup > 0 or bool(recipe.mixing.cutmix)
    augmentation = recipe.alteration.augmentation
    changed = augmentation.flip or not augmentation.only_moves or augmentation.crop != "none"
    return " and ".join(word for word, true in (("mixed", mixed), ("altered", changed)) if true)


def _had_better_be_tuned(run: Run) -> bool:
    """Whether a run begins from scratch on few photographs, which icons of a few pixels are not."""
    from_scratch = run.checkpoint.metadata.get("base") is None
    photographs = min(run.checkpoint.preprocess.img_size) >= 64
    return from_scratch and photographs and len(run.data.split("train")) < _FEW_PHOTOGRAPHS


def describe_recipe(run: Run) -> str:
    """The settings that were chosen, and what they come to, in lines for people."""
    recipe, model = run.recipe, run.model
    parameters = sum(parameter.numel() for parameter in model.parameters())
    rows, columns = model.config.grid_size
    budget = ", ".join(f"{value:g} {name}" for name, value in recipe.limits.given())
    height, width = run.checkpoint.preprocess.img_size
    return (
        f"model: {recipe.start.model} at {height}x{width} pixels, {rows}x{columns} patches\n"
        f"       {parameters:,} parameters; {run.placement}\n"
        f"recipe: {budget}; batch_size {recipe.batches.batch_size}, seed {recipe.course.seed}\n"
        f"        {_peak_rate(recipe)}, weight_decay {recipe.optimization.weight_decay:g}\n"
        f"        crop {recipe.alteration.crop}, flip {str(recipe.alteration.flip).lower()}\n"
        f"all settings: {run.folder / 'recipe.toml'}"
    )


def _peak_rate(recipe: Resolved) -> str:
    """The rate that a run takes, and how it came to it if it is not the recipe's own."""
    peak = schedule_of(recipe).peak
    if peak == recipe.rate.learning_rate:
        return f"learning_rate {peak:g}"
    asked = f"{recipe.rate.learning_rate:g} for {recipe.rate.learning_rate_batch:,} images"
    return f"learning_rate {peak:g} ({asked})"


def _epoch(run: Run) -> str:
    epochs = run.recipe.limits.epochs
    of = f"/{epochs:g}" if math.isfinite(epochs) else ""
    return f"epoch {run.epoch:.1f}{of}"


class _ShareColumn(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(f"{task.completed:4.0%}")


class _Pace:
    """Speed and time left, since the first step of this session of the run."""

    def __init__(self, run: Run) -> None:
        self.step, self.seconds, self.progress = run.state.step, run.state.seconds, run.progress

    def images_per_second(self, run: Run) -> float:
        steps, seconds = run.state.step - self.step, run.state.seconds - self.seconds
        return steps * run.recipe.batches.batch_size / max(seconds, 1e-9)

    def left(self, run: Run) -> str:
        gained = run.progress - self.progress
        if gained <= 0:
            return "?"
        return clock((1 - run.progress) * (run.state.seconds - self.seconds) / gained)
