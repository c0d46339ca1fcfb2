"""What people see of a run while it trains: a live bar, and a plain line for each epoch."""

import math
import sys
import time
from itertools import accumulate

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn
from rich.table import Column
from rich.text import Text

from vitral.cli.console import PLAIN_LINE_SECONDS, clock, wrapped
from vitral.runtime.streams import shown, steady
from vitral.training.events import Evaluated, Event, RunBegins, RunEnds, StepDone
from vitral.training.listeners import Message
from vitral.training.listeners import Progress as WorkProgress
from vitral.training.run import Run

# Between two updates of the numbers; reading a loss waits for the device.
_REFRESH_SECONDS = 0.5
_NARROWEST_BAR = 4
# With more, a model from scratch has mostly enough to learn from.
_FEW_PHOTOGRAPHS = 10_000
_TUNING_ADVICE = "few images to begin from scratch with: model=auto minutes=30 may do better"


class TrainingConsole:
    """A live bar with loss, accuracy, images per second and time left, and a line for each epoch."""

    def __init__(self) -> None:
        # Losing the terminal is not losing the run, in a program of the user's own too.
        stream = steady(sys.stderr)
        self.console = Console(file=stream, highlight=False, soft_wrap=True, markup=False, emoji=False)
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TextColumn("{task.completed:4.0%}"),
            _NumbersColumn(self.console),
            console=self.console,
            transient=True,
            disable=not self.console.is_terminal,
        )
        self.task = self.progress.add_task("starting", total=1.0, numbers=())
        self.shown_at = time.monotonic()
        self.pace: _Pace | None = None
        self.epochs, self.batch_size = math.inf, 0

    def __call__(self, event: Event) -> None:
        """Listen to a run."""
        match event:
            case Message():
                self.message(event.text)
            case WorkProgress():
                self.preparing(event.what, event.done, event.total)
            case RunBegins():
                self.begin(event.run)
            case StepDone():
                self.step(event)
            case Evaluated() if event.step:  # of the start a message tells
                self.epoch(event)
            case RunEnds():
                self.progress.stop()

    def print(self, text: str) -> None:
        self.console.print(wrapped(text, self.console.file))

    def message(self, text: str) -> None:
        self.print(f"vitral: {shown(text)}")

    def preparing(self, what: str, done: int, total: int) -> None:
        if self.console.is_terminal:
            self.progress.update(
                self.task, completed=done / total, description=what, numbers=[f"{done:,} of {total:,} images"]
            )
        elif time.monotonic() - self.shown_at >= PLAIN_LINE_SECONDS / 3:
            self.shown_at = time.monotonic()
            self.print(f"{what}: {done:,} of {total:,} images")

    def begin(self, run: Run) -> None:
        self.print(run.data.describe())
        self.print(describe_recipe(run))
        self.print(str(run.memory))
        if _is_augmented(run):
            self.print(
                "train loss and accuracy are measured on augmented images, val on the images as they are"
            )
        if _had_better_be_tuned(run):
            self.print(_TUNING_ADVICE)
        self.epochs = run.recipe.limits.epochs
        self.batch_size = run.recipe.batches.batch_size
        self.progress.start()

    def step(self, done: StepDone) -> None:
        if self.pace is None:  # what comes before the first step, and compiling in it, are not its pace
            self.pace = _Pace(done, self.batch_size)
            return
        interval = _REFRESH_SECONDS if self.console.is_terminal else PLAIN_LINE_SECONDS
        if time.monotonic() - self.shown_at < interval:
            return
        self.shown_at = time.monotonic()
        numbers = (
            f"loss {done.training.loss:.3f}",
            f"{done.training.accuracy:.1%} right",
            f"{self.pace.images_per_second(done):,.0f} images/s",
            f"{self.pace.left(done)} left",
        )
        if self.console.is_terminal:
            self.progress.update(
                self.task, completed=done.progress, description=self._epoch(done), numbers=numbers
            )
        else:
            self.print(f"{self._epoch(done)}  {done.progress:4.0%}  {'  '.join(numbers)}")

    def epoch(self, judged: Evaluated) -> None:
        evaluation, training = judged.evaluation, judged.training
        best = "  best" if judged.is_best else ""
        self.print(
            f"{self._epoch(judged)}  train loss {training.loss:.3f} {training.accuracy:.1%}  "
            f"val loss {evaluation.loss:.3f} {evaluation.brief}  {clock(judged.seconds)}{best}"
        )
        self.shown_at = time.monotonic()

    def _epoch(self, event: StepDone | Evaluated) -> str:
        of = f"/{self.epochs:g}" if math.isfinite(self.epochs) else ""
        return f"epoch {event.epoch:.1f}{of}"


def _is_augmented(run: Run) -> bool:
    """Whether training changes images in a way that evaluation does not."""
    recipe = run.recipe
    mixed = recipe.mixing.mixup > 0 or bool(recipe.mixing.cutmix)
    augmentation = recipe.alteration.augmentation
    return mixed or augmentation.flip or not augmentation.only_moves or augmentation.crop != "none"


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
        f"        {_peak_rate(run)}, weight_decay {recipe.optimization.weight_decay:g}\n"
        f"        crop {recipe.alteration.crop}, flip {str(recipe.alteration.flip).lower()}\n"
        f"all settings: {run.files.path / 'recipe.toml'}"
    )


def _peak_rate(run: Run) -> str:
    """The rate that a run takes, and how it came to it if it is not the recipe's own."""
    peak, rate = run.schedule.peak, run.recipe.rate
    if peak == rate.learning_rate:
        return f"learning_rate {peak:g}"
    return f"learning_rate {peak:g} ({rate.learning_rate:g} for {rate.learning_rate_batch:,} images)"


class _NumbersColumn(ProgressColumn):
    """The numbers that there is room for, the last before all others; the bar has what is left."""

    def __init__(self, console: Console) -> None:
        super().__init__(Column(no_wrap=True))
        self.console = console

    def render(self, task: Task) -> Text:
        numbers = task.fields["numbers"]
        by_need = [*numbers[-1:], *numbers[:-1]]
        room = self.console.width - len(f"{task.description}  100%") - _NARROWEST_BAR
        count = sum(end <= room for end in accumulate(len(number) + 2 for number in by_need))
        return Text("  ".join([*by_need[1:count], *by_need[:count][:1]]))


class _Pace:
    """Speed and time left, since the first step of this session of the run."""

    def __init__(self, first: StepDone, batch_size: int) -> None:
        self.first, self.batch_size = first, batch_size

    def images_per_second(self, done: StepDone) -> float:
        steps, seconds = done.step - self.first.step, done.seconds - self.first.seconds
        return steps * self.batch_size / max(seconds, 1e-9)

    def left(self, done: StepDone) -> str:
        gained = done.progress - self.first.progress
        if gained <= 0:
            return "?"
        return clock((1 - done.progress) * (done.seconds - self.first.seconds) / gained)
