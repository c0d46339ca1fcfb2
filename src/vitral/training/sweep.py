"""A sweep: the same data with several recipes, a run each, in a folder of its own.

A trial's folder is named by its settings, so that the same sweep goes on where it stopped, and a larger one
takes over the runs that it shares with it; nothing else is remembered. That is all a grid or a search of
scattered points needs, which is why there is no Optuna here: its database would be a second memory beside the
runs' own files.
"""

import hashlib
import itertools
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vitral.data.image_data import DataSource
from vitral.recipes.recipe import Recipe
from vitral.runtime.errors import VitralError
from vitral.runtime.settings import parse_overrides
from vitral.training.events import Listener
from vitral.training.interface import train
from vitral.training.run_folder import RunFolder
from vitral.training.runs import Overview, look_at

_LISTS = ("track", "betas", "candidates", "img_size")  # settings whose own values have commas
_RANGE = re.compile(r"([-+.\de]+)\.\.([-+.\de]+)")
_LONGEST_NAME = 100
_MOST_TRIALS = 10_000


@dataclass(frozen=True)
class Range:
    """Numbers from the first to the second; even by their logarithms where both are above 0."""

    low: float
    high: float
    whole: bool

    def at(self, share: float) -> int | float:
        """The number that lies at this share of the range."""
        if self.low > 0:
            value = self.low * (self.high / self.low) ** share
        else:
            value = self.low + (self.high - self.low) * share
        return round(value) if self.whole else float(f"{value:.3g}")


@dataclass(frozen=True)
class Plan:
    """What a sweep tries."""

    fixed: Mapping[str, Any]
    choices: Mapping[str, Sequence[Any] | Range]

    @classmethod
    def of(cls, words: Sequence[str]) -> "Plan":
        """Read ``["learning_rate=1e-4,3e-4", "weight_decay=0..0.3", "minutes=5"]``.

        Raises:
            VitralError: if a word is no setting, or nothing is to be tried.
        """
        fixed: dict[str, Any] = {}
        choices: dict[str, Sequence[Any] | Range] = {}
        for word in words:
            name, _, text = word.partition("=")
            parts = [text] if name in _LISTS and "[" not in text else _parts(text)
            if span := _RANGE.fullmatch(text):
                choices[name] = _range(word, *span.groups())
            elif len(parts) > 1:
                choices[name] = [parse_overrides([f"{name}={part}"])[name] for part in parts]
            else:
                fixed |= parse_overrides([word])
        if not choices:
            raise VitralError(
                "there is nothing to try: give a setting several values, learning_rate=1e-4,3e-4"
            )
        return cls(fixed, choices)

    def grid(self) -> list[dict[str, Any]]:
        """Every combination of the values.

        Raises:
            VitralError: if there is a range, or there are too many.
        """
        for name, values in self.choices.items():
            if isinstance(values, Range):
                raise VitralError(
                    f"{name} is a range, of which --random N takes N points; or list its values"
                )
        count = math.prod(len(values) for values in self.choices.values() if not isinstance(values, Range))
        if count > _MOST_TRIALS:
            raise VitralError(f"that is {count:,} runs; take --random N of them")
        lists: Any = self.choices.values()
        return [dict(zip(self.choices, values, strict=True)) for values in itertools.product(*lists)]

    def scattered(self, count: int, seed: int) -> list[dict[str, Any]]:
        """`count` points that lie evenly in the space, more evenly than random ones (Halton, scrambled).

        The first points of a larger count are those of a smaller one.
        """
        from scipy.stats import qmc

        shares = qmc.Halton(len(self.choices), rng=seed).random(count)
        points = [
            {name: _value(of, share) for (name, of), share in zip(self.choices.items(), row, strict=True)}
            for row in shares.tolist()
        ]
        return [point for place, point in enumerate(points) if point not in points[:place]]


def _parts(text: str) -> list[str]:
    """Split at commas that stand in no brackets or quotes."""
    return [part.strip() for part in re.findall(r"(?:\[[^\]]*\]|\"[^\"]*\"|[^,])+", text)]


def _range(word: str, low: str, high: str) -> Range:
    try:
        ends = float(low), float(high)
    except ValueError:
        raise VitralError(f"{word}: a range is two numbers with .. between, 1e-4..1e-2") from None
    if not ends[0] < ends[1]:
        raise VitralError(f"{word}: a range goes from the smaller to the larger number")
    return Range(*ends, whole=low.isdecimal() and high.isdecimal())


def _value(values: Sequence[Any] | Range, share: float) -> Any:
    return values.at(share) if isinstance(values, Range) else values[int(share * len(values))]


@dataclass(frozen=True)
class Trial:
    """One run of a sweep."""

    folder: Path
    settings: Mapping[str, Any]  # those that are tried
    run: Overview | None  # None: it never began
    failure: str | None = None


def sweep(
    data: DataSource,
    out: Path,
    trials: Sequence[Mapping[str, Any]],
    base: Recipe,
    *,
    listeners: Callable[[], Sequence[Listener]] = tuple,
    tell: Callable[[str], None] = lambda _: None,
) -> Iterator[Trial]:
    """Run each trial that is not finished in a folder of its own below `out`, and give it.

    Args:
        data: as `train` takes it.
        out: the sweep's folder.
        trials: the settings of each.
        base: what all of them share.
        listeners: made for each run.
        tell: told which trial begins.

    Raises:
        VitralError: before any of them, if a trial's settings are unknown or unfit, or its folder holds a
            run with others.
    """
    recipes = [base.changed(**settings) for settings in trials]
    folders = [out / named(settings) for settings in trials]
    for folder, recipe in zip(folders, recipes, strict=True):
        _refuse_other(folder, recipe)
    for place, (folder, settings, recipe) in enumerate(zip(folders, trials, recipes, strict=True), 1):
        if RunFolder(folder).finished:
            yield Trial(folder, settings, look_at(folder))
            continue
        tell(f"run {place} of {len(trials)}: {folder.name}")
        failure = None
        resume = RunFolder(folder).holds_run
        try:
            asked: dict[str, Any] = {} if resume else {"recipe": recipe}
            summary = train(data, folder, resume=resume, listeners=listeners(), **asked)
            if not summary.finished:
                yield Trial(folder, settings, look_at(folder), "stopped")
                return
        except VitralError as error:
            failure = str(error)
        there = RunFolder(folder).holds_run
        yield Trial(folder, settings, look_at(folder) if there else None, failure)


def named(settings: Mapping[str, Any]) -> str:
    """Name a trial's folder by its settings."""
    text = ",".join(f"{name}={value}" for name, value in settings.items())
    name = re.sub(r"[^\w.,=+-]+", "-", text)
    digest = hashlib.sha256(text.encode()).hexdigest()[:8]
    return name if len(name) <= _LONGEST_NAME else f"{name[:_LONGEST_NAME]}-{digest}"


def _refuse_other(folder: Path, recipe: Recipe) -> None:
    """Raise VitralError if the folder holds a run that was begun with other settings than these."""
    record = RunFolder(folder).record if RunFolder(folder).holds_run else None
    if record is None:
        return
    had = Recipe(**record.recipe).given
    for name, value in recipe.given.items():
        if had.get(name) != value:
            raise VitralError(
                f"{folder} was begun with {name}={had.get(name)}, and you ask for {name}={value}; choose "
                "another --out"
            )
