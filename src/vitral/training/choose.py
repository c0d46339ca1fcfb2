"""Which way to train is best here: each is tried for a short while, and held-out images decide.

What wins depends on the weights, the images and the time (docs/log.md, 2026-11-26): fine-tuning everything
mostly, adapters where steps are few, a model from scratch where there are many images and little to know.
"""

import json
import math
import signal
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from vitral.checkpoints.folder import is_checkpoint, load_checkpoint
from vitral.data.image_data import ImageData
from vitral.evaluation.task import task_of
from vitral.recipes.recipe import Recipe
from vitral.recipes.resolve import resolve, start
from vitral.runtime.devices import cpu_count
from vitral.runtime.errors import VitralError
from vitral.runtime.stopping import Interrupted
from vitral.training import loop
from vitral.training.events import Listener
from vitral.training.listeners import Listeners
from vitral.training.parts import OURS, Parts
from vitral.training.run_folder import RunFolder
from vitral.training.state import Summary

AUTO = "auto"  # the model that says: find out
# Of the budget, for all trials together, and the least time of one that is worth its start.
_SHARE = 0.2
_LEAST_SECONDS = 20.0
# In fewer steps adapters learn faster, and all weights win in the end (docs/log.md, 2026-11-26).
_LEAST_STEPS = 100
# Patches a side that a model from elsewhere is tuned at where nobody says: DINOv2 has 37, which would take
# 20 times as long as 7.
_FEWEST_PATCHES, _MOST_PATCHES = 7, 16


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
    RunFolder(folder).refuse_to_begin(data, recipe)
    begun = time.monotonic()
    ways = _ways(data, recipe, tell)
    seconds = _SHARE * 60 * (recipe.get("minutes") or 0.0) / len(ways)
    if len(ways) > 1 and seconds < _LEAST_SECONDS:
        tell.message(f"too short a time to try {len(ways)} ways; taken: {ways[0].name}")
        ways = ways[:1]
    way = ways[0] if len(ways) == 1 else _tried(data, recipe, ways, seconds, tell, parts)
    return loop.train(
        data,
        folder,
        recipe.changed(**way.settings),
        listeners=listeners,
        parts=parts,
        spent=time.monotonic() - begun,
    )


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
    if _has_adapters():
        ways.append(Way(f"{named}, LoRA", {**settings, "trained": "lora"}))
    return ways


def _has_adapters() -> bool:
    import importlib.util

    return importlib.util.find_spec("peft") is not None


def _size(base: str, data: ImageData) -> int | tuple[int, int]:
    """The base's own size, or a smaller one of whole patches, about as large as the images."""
    checkpoint = load_checkpoint(base)
    height, width = checkpoint.preprocess.img_size
    patch = checkpoint.model.config.patch_size
    side = float(np.median(data.split("train").typical_sizes.min(axis=1)))
    patches = int(np.clip(round(side / patch), _FEWEST_PATCHES, _MOST_PATCHES))
    return (height, width) if min(height, width) <= patches * patch else patches * patch


def _size_from_scratch(data: ImageData, recipe: Recipe) -> int | tuple[int, int] | None:
    """The size that was asked for, unless it is of whole patches of the candidates alone."""
    try:
        start(resolve(recipe.changed(model=None), data, None, cpu_count()), data.classes, None)
    except VitralError:
        return None
    return recipe.get("img_size")


# --- Trials --------------------------------------------------------------------------------------


def _tried(
    data: ImageData, recipe: Recipe, ways: list[Way], seconds: float, tell: Listeners, parts: Parts
) -> Way:
    trials = []
    for way in ways:
        tell.message(f"trying {way.name}, {seconds:.0f} s")
        try:
            trials.append(_trial(data, recipe, way, seconds, parts))
        except VitralError as error:
            tell.message(f"{way.name} cannot be tried: {error}")
    if not trials:
        return ways[0]  # its run says what is wrong
    best = choose(trials)
    tell.message(f"tried {len(ways)} ways for {seconds:.0f} s each, on {trials[0].images:,} held-out images:")
    for trial in trials:
        few = ", too few steps to tell" if trial.steps < _LEAST_STEPS else ""
        tell.message(f"  {trial.way.name}: {trial.score:.1%}, may reach {trial.expected:.0%}{few}")
    tell.message(f"taken for the rest of the time: {best.name}")
    return best


def choose(trials: list[Trial]) -> Way:
    """The way that is expected to end best; the first, unless another is better by more than chance.

    Trials of few steps say nothing.
    """
    first = trials[0]
    best = max((trial for trial in trials if trial.steps >= _LEAST_STEPS), key=_expected, default=first)
    noise = math.hypot(first.noise, best.noise)
    return best.way if best.expected > first.expected + noise else first.way


def _expected(trial: Trial) -> float:
    return trial.expected


def _trial(data: ImageData, recipe: Recipe, way: Way, seconds: float, parts: Parts) -> Trial:
    """A run of `seconds` of its own, its rate falling to 0 within them."""
    splits = {name: data.splits[name] for name in ("train", "val") if name in data.splits}
    short = recipe.changed(
        **way.settings,
        minutes=seconds / 60,
        epochs=None,
        steps=None,
        compile=False,
        checkpoint_steps=10**9,
    )
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "trial"
        summary = loop.train(replace(data, splits=splits), folder, short, parts=parts)
        if not summary.finished:  # nothing was written that could be taken up again
            raise Interrupted(summary.stopped_by or signal.SIGINT)
        records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    name = f"val_{task_of(data).score_name}"
    points = [(record["seconds"], record[name]) for record in records]
    expected = extrapolated(points, 60 * (recipe.get("minutes") or 0.0) * (1 - _SHARE))
    return Trial(way, max(score for _, score in points), len(splits["val"]), expected, summary.steps)


def extrapolated(points: list[tuple[float, float]], seconds: float) -> float:
    """The score after `seconds`, from a run's scores at (seconds, score).

    Errors fall as a power of the time (Hestness et al., arXiv:1712.00409, §3). The power is read off the best
    scores by half of the run and by its end; 1 at most, for steep falls end in a floor.
    """
    end = points[-1][0]
    best = max(score for _, score in points)
    early = [(at, score) for at, score in points if at <= 0.6 * end] or [(0.5 * end, 0.0)]
    middle, half = (max(column) for column in zip(*early, strict=True))
    error, earlier = (max(1 - score, 1e-3) for score in (best, half))
    power = math.log(earlier / error) / math.log(end / max(middle, 1e-3 * end))
    return 1 - error * (end / max(seconds, end)) ** min(max(power, 0.0), 1.0)
