"""Which way to train is best here: each is tried for a short while, and held-out images decide.

What wins depends on the weights, the images and the time (docs/log.md, 2026-11-26): fine-tuning everything
mostly, adapters where steps are few, a model from scratch where there are many images and little to know.
"""

import math
import signal
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from vitral.checkpoints.folder import is_checkpoint, load_checkpoint
from vitral.data.image_data import ImageData
from vitral.data.split import Split
from vitral.recipes.recipe import Recipe
from vitral.recipes.resolve import resolve, start
from vitral.runtime.errors import VitralError
from vitral.runtime.extras import is_installed
from vitral.runtime.stopping import Interrupted
from vitral.runtime.threads import cpu_count
from vitral.runtime.world import ALONE, joined
from vitral.training import loop
from vitral.training.events import Evaluated, Event, Listener, StepDone
from vitral.training.listeners import Listeners, Progress
from vitral.training.parts import OURS, Parts
from vitral.training.run_folder import RunFolder
from vitral.training.state import Summary

AUTO = "auto"  # the model that says: find out
# Of the budget, for all trials together: where steps are fast, and at most. The least time of one that is
# worth its start.
_SHARE, _MOST_SHARE = 0.2, 1 / 3
_LEAST_SECONDS = 20.0
# In fewer steps adapters learn faster, and all weights win in the end (docs/log.md, 2026-11-26). A trial's
# start and evaluations take as long as half of them.
_LEAST_STEPS = 100
_ROOM = 1.5
# Steps that are timed before the trials, after one that warms up; images that the start is judged by there.
_TIMED_STEPS = 4
_JUDGED_IMAGES = 64
# Of the power of the time by which errors fall: what runs were measured at (docs/log.md, 2026-11-26). One
# trial's own is noise, and steeper at its end, where the rate falls.
_STEEPEST = 0.5
# Patches a side that a model from elsewhere is tuned at where nobody says: DINOv2 has 37, which would take
# 20 times as long as 7.
_FEWEST_PATCHES, _MOST_PATCHES = 7, 16
# How much larger its own size may be: a hybrid of 32 pixels had 86 % at its start on images of 28, and 81 at
# their size (docs/log.md, 2026-11-26).
_SLIGHTLY_LARGER = 1.25


@dataclass(frozen=True)
class Way:
    """One way to train."""

    name: str
    settings: dict[str, Any]  # of a recipe


@dataclass(frozen=True)
class Trial:
    """How a way did in a short run."""

    way: Way
    score: float  # of the validation images, 0 to 1
    images: int  # that it was judged by
    expected: float  # score that the whole budget would lead to
    steps: int

    @property
    def noise(self) -> float:
        """Standard error of the score."""
        return math.sqrt(max(self.score * (1 - self.score), 1 / self.images) / self.images)


def train(
    data: ImageData,
    folder: Path,
    recipe: Recipe,
    *,
    resume: bool = False,
    listeners: Sequence[Listener] = (),
    parts: Parts = OURS,
) -> Summary:
    """Train as `loop.train`, after a choice of what the recipe leaves open: ``model="auto"`` and `trained`.

    Ways are tried where the budget is in minutes; the trials are part of it.

    Raises:
        VitralError: as `vitral.training.loop.train`; or if the model is "auto" and no minutes are given.
    """
    tell = Listeners(*listeners)
    if resume:
        return loop.train(data, folder, recipe, resume=True, listeners=listeners, parts=parts)
    if recipe.get("model") == AUTO and not recipe.get("minutes"):
        raise VitralError("model=auto tries several ways, for which it needs a time to keep to: minutes=30")
    with joined() as world:
        RunFolder(folder, world=world).refuse_to_begin(data, recipe)
        begun = time.monotonic()
        # Trials are of one process: of several, the first tries alone and the others wait.
        way = world.from_first(lambda: _chosen(data, recipe, tell, parts), patient=True)
        return loop.train(
            data,
            folder,
            recipe.changed(**way.settings),
            listeners=listeners,
            parts=parts,
            spent=time.monotonic() - begun,
        )


def _chosen(data: ImageData, recipe: Recipe, tell: Listeners, parts: Parts) -> "Way":
    ways = _ways(data, recipe, tell)
    # Without validation images the run says what is missing.
    tries = len(ways) > 1 and "val" in data.splits
    return _tried(data, recipe, ways, tell, parts) if tries else ways[0]


# --- The ways ------------------------------------------------------------------------------------


def _ways(data: ImageData, recipe: Recipe, tell: Listeners) -> list[Way]:
    """Those that the recipe leaves open; the first is taken where there is no time to try."""
    model = recipe.get("model")
    if model != AUTO:
        if recipe.get("minutes") and "trained" not in recipe.given and model and is_checkpoint(model):
            return _of_base(model, {})
        return [Way("as asked", {})]
    ways: list[Way] = []
    for base in recipe.get("candidates"):
        try:
            ways += _of_base(base, {"model": base, "img_size": recipe.get("img_size") or _size(base, data)})
        except VitralError as error:
            tell.message(f"{base} cannot be tried: {error}")
    scratch = {"model": None, "img_size": _size_from_scratch(data, recipe)}
    return [*ways, Way("from scratch", scratch)]


def _of_base(base: str, settings: dict[str, Any]) -> list[Way]:
    named = Path(base).name
    ways = [Way(f"{named}, all of it", {**settings, "trained": "all"})]
    if is_installed("peft"):
        ways.append(Way(f"{named}, LoRA", {**settings, "trained": "lora"}))
    return ways


def _size(base: str, data: ImageData) -> int | tuple[int, int]:
    """The base's own size; where it is clearly larger than the images, one of whole patches like theirs."""
    checkpoint = load_checkpoint(base)
    height, width = checkpoint.preprocess.img_size
    patch = checkpoint.model.config.patch_size
    side = float(np.median(data.split("train").typical_sizes.min(axis=1)))
    patches = int(np.clip(round(side / patch), _FEWEST_PATCHES, _MOST_PATCHES))
    keeps = min(height, width) <= _SLIGHTLY_LARGER * patches * patch
    return (height, width) if keeps else patches * patch


def _size_from_scratch(data: ImageData, recipe: Recipe) -> int | tuple[int, int] | None:
    """The size that was asked for, unless it is of whole patches of the candidates alone."""
    try:
        start(resolve(recipe.changed(model=None), data, None, cpu_count()), data.classes, None)
    except VitralError:
        return None
    return recipe.get("img_size")


# --- Trials --------------------------------------------------------------------------------------


def _tried(data: ImageData, recipe: Recipe, ways: list[Way], tell: Listeners, parts: Parts) -> Way:
    """The way that does best in trials of the same length; the first, where there is no time for two."""
    budget = 60 * recipe.get("minutes")
    if _MOST_SHARE * budget < 2 * _LEAST_SECONDS:
        tell.message(f"not enough time to try {len(ways)} ways; Vitral takes: {ways[0].name}")
        return ways[0]
    tell.message(f"preparing to try {len(ways)} ways")
    end = time.monotonic() + _MOST_SHARE * budget
    ways, seconds_a_step = _made_ready(data, recipe, ways, end, tell, parts)
    least = max(_LEAST_SECONDS, _ROOM * _LEAST_STEPS * seconds_a_step)
    ways = _affordable(ways, (end - time.monotonic()) / least)
    if len(ways) == 1:
        needed = _LEAST_STEPS * seconds_a_step
        told = f"{_LEAST_STEPS} steps, the fewest that tell something, take about {needed:.0f} s"
        tell.message(f"{told}, too long to try several ways; Vitral takes: {ways[0].name}")
        return ways[0]
    seconds = max(least, _SHARE * budget / len(ways))
    trials = _trials(data, recipe, ways, seconds, tell, parts)
    best = choose(trials) if trials else ways[0]  # whose run says what is wrong
    for line in _found(trials, seconds):
        tell.message(line)
    tell.message(f"for the rest of the time: {best.name}")
    return best


def _trials(
    data: ImageData, recipe: Recipe, ways: list[Way], seconds: float, tell: Listeners, parts: Parts
) -> list[Trial]:
    trials = []
    for way in ways:
        tell.message(f"trying {way.name}, {seconds:.0f} s")
        try:
            trials.append(_trial(data, recipe, way, seconds, parts))
        except VitralError as error:
            tell.message(f"{way.name} cannot be tried: {error}")
    return trials


def _found(trials: list[Trial], seconds: float) -> Iterator[str]:
    """What the trials came to, in lines."""
    if trials:
        yield f"tried {len(trials)} ways for {seconds:.0f} s each, on {trials[0].images:,} held-out images:"
    for trial in trials:
        few = ", too few steps to tell" if trial.steps < _LEAST_STEPS else ""
        yield f"  {trial.way.name}: {trial.score:.1%}, may reach {trial.expected:.0%}{few}"


def _affordable(ways: list[Way], count: float) -> list[Way]:
    """As many of the ways as there is time for, one at least.

    Adapters are the first to be left out: where they win, they win by least.
    """
    kept = sorted(ways, key=_adapts)[: max(int(count), 1)]
    return [way for way in ways if way in kept]


def _adapts(way: Way) -> bool:
    return way.settings.get("trained") == "lora"


def choose(trials: list[Trial]) -> Way:
    """The way that is expected to end best; the first, unless another is better by more than chance.

    Trials of few steps say nothing, and nothing is better than a first one that says nothing.
    """
    first = trials[0]
    if first.steps < _LEAST_STEPS:
        return first.way
    best = max((trial for trial in trials if trial.steps >= _LEAST_STEPS), key=_expected)
    noise = math.hypot(first.noise, best.noise)
    return best.way if best.expected > first.expected + noise else first.way


def _expected(trial: Trial) -> float:
    return trial.expected


class _FirstSteps:
    """Ends a run once a few steps are timed."""

    def __init__(self, tell: Listeners) -> None:
        self.tell = tell
        self.ends: list[float] = []

    def __call__(self, event: Event) -> None:
        if isinstance(event, Progress):
            self.tell(event)
        elif isinstance(event, StepDone):
            self.ends.append(event.seconds)
            if len(self.ends) > _TIMED_STEPS:
                raise _EnoughError

    @property
    def seconds_a_step(self) -> float:
        return (self.ends[-1] - self.ends[0]) / max(len(self.ends) - 1, 1)


class _EnoughError(Exception):
    """What was to be seen of a run is seen."""


def _made_ready(
    data: ImageData, recipe: Recipe, ways: list[Way], end: float, tell: Listeners, parts: Parts
) -> tuple[list[Way], float]:
    """The ways that can be tried, and the seconds that a step of the slowest takes.

    What a first run reads and computes is kept by the system, and in the cache of features, by the measure of
    the whole budget: every trial finds it there, and so does the run that follows. No way is begun after the
    time `end`.
    """
    val = data.split("val")
    judged = val.take(np.arange(min(_JUDGED_IMAGES, len(val))))
    ready, slowest = [], 0.0
    for way in sorted(ways, key=_adapts):
        if ready and time.monotonic() > end:
            break
        first_steps = _FirstSteps(tell)
        try:
            _short_run(data, judged, recipe.changed(**way.settings), first_steps, parts)
        except _EnoughError:
            pass
        except VitralError as error:
            tell.message(f"{way.name} cannot be tried: {error}")
            continue
        ready.append(way)
        slowest = max(slowest, first_steps.seconds_a_step)
    if not ready:
        return ways[:1], slowest  # whose run says what is wrong
    return [way for way in ways if way in ready], slowest


def _trial(data: ImageData, recipe: Recipe, way: Way, seconds: float, parts: Parts) -> Trial:
    """A run of `seconds` of its own, its rate falling to 0 within them."""
    points: list[tuple[float, float]] = []
    images = 0  # that it was judged by

    def keep(event: Event) -> None:
        nonlocal images
        if isinstance(event, Evaluated):
            points.append((event.seconds, event.evaluation.score))
            images = event.evaluation.n

    short = recipe.changed(**way.settings, minutes=seconds / 60)
    summary = _short_run(data, data.split("val"), short, keep, parts)
    expected = extrapolated(points, 60 * recipe.get("minutes") * (1 - _SHARE))
    return Trial(way, max(score for _, score in points), images, expected, summary.steps)


def _short_run(data: ImageData, judged: Split, recipe: Recipe, listener: Listener, parts: Parts) -> Summary:
    """A run of which nothing is kept. Raises Interrupted if it is stopped."""
    splits = {"train": data.split("train"), "val": judged}
    short = recipe.changed(epochs=None, steps=None, compile=False, checkpoint_steps=10**9, track=None)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "trial"
        summary = loop.train(
            replace(data, splits=splits), folder, short, listeners=[listener], parts=parts, world=ALONE
        )
    if not summary.finished:  # nothing was written that could be taken up again
        raise Interrupted(summary.stopped_by or signal.SIGINT)
    return summary


def extrapolated(points: list[tuple[float, float]], seconds: float) -> float:
    """The score after `seconds`, from a run's scores at (seconds, score).

    Errors fall as a power of the time (Hestness et al., arXiv:1712.00409, §3). The power is read off the best
    scores by half of the run and by its end; steep falls end in a floor.
    """
    end = points[-1][0]
    best = max(score for _, score in points)
    early = [(at, score) for at, score in points if at <= 0.6 * end] or [(0.5 * end, 0.0)]
    middle, half = (max(column) for column in zip(*early, strict=True))
    error, earlier = (max(1 - score, 1e-3) for score in (best, half))
    power = math.log(earlier / error) / math.log(end / max(middle, 1e-3 * end))
    return 1 - error * (end / max(seconds, end)) ** min(max(power, 0.0), _STEEPEST)
