"""A run from Python, whose settings are keywords; `vitral.reports.train` is its door."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from os import PathLike
from pathlib import Path
from typing import Any, Self

from torch import nn

from vitral.data.image_data import DataSource, ImageData, open_data
from vitral.model.vit import VisionTransformer
from vitral.recipes import packaged
from vitral.recipes.recipe import Recipe
from vitral.recipes.resolve import MODULE
from vitral.runtime.errors import VitralError, one_line
from vitral.runtime.world import elastic_run, joined
from vitral.training.changes import CHANGEABLE, changed
from vitral.training.choose import train as run_training
from vitral.training.events import Listener
from vitral.training.listeners import Listeners
from vitral.training.parts import OURS, Parts
from vitral.training.run_folder import RunFolder
from vitral.training.state import Summary


def train(
    data: DataSource,
    out: str | PathLike,
    *,
    recipe: str | PathLike | Recipe | None = None,
    resume: bool = False,
    listeners: Sequence[Listener] = (),
    **settings: Any,
) -> Summary:
    """Train as `vitral.train` does, but for the report that a recipe may ask for."""
    names = {part.name for part in fields(Parts)}
    parts: dict[str, Any] = {
        name: part for name, part in settings.items() if name in names and callable(part)
    }
    begin = recipe if isinstance(recipe, Recipe) else packaged.recipe_of(str(recipe or ""))
    wanted = begin.changed(**{name: value for name, value in settings.items() if name not in parts})
    if "model" in parts:
        wanted = wanted.changed(**_settings_of(parts["model"], wanted, resume=resume))
    with joined() as world:
        start = Start.of(RunFolder(Path(out), world=world), wanted, resume=resume)
        for note in start.notes if world.is_first else ():
            Listeners(*listeners).message(note)
        images = open_data(data, **start.opening)
        return start.train(images, listeners, Parts(**parts))


@dataclass(frozen=True)
class Start:
    """How a command begins: a new run, or one that it takes up again."""

    files: RunFolder
    recipe: Recipe
    resume: bool
    opening: dict[str, Any]  # how its images are opened, as `open_data` takes it
    ended: Summary | None = None  # of a run that is finished: there is nothing to do
    notes: tuple[str, ...] = ()

    @classmethod
    def of(cls, files: RunFolder, wanted: Recipe, *, resume: bool) -> Self:
        """Look into the folder. Every process of the run asks.

        torchrun starts the same command again after a process died or machines came or left: it goes on.

        Raises:
            VitralError: if there is nothing to resume, or `wanted` would change what the run computes.
        """
        notes, ended = (), None
        if not resume and elastic_run() is not None and files.holds_run:
            resume, notes = True, (f"{files.path} holds this run already: it goes on (torchrun)",)
            given = {name: value for name, value in wanted.settings.items() if name in CHANGEABLE}
            wanted, ended = Recipe(**given), files.summary() if files.finished else None
        if not resume:
            return cls(files, wanted, False, wanted.opening)
        begun = changed(files.recipe(), wanted)
        return cls(files, wanted, True, begun.opening, ended, notes)

    def train(self, images: ImageData, listeners: Sequence[Listener], parts: Parts = OURS) -> Summary:
        """Carry the run out."""
        if self.ended is not None:
            return self.ended
        return run_training(
            images, self.files.path, self.recipe, resume=self.resume, listeners=listeners, parts=parts
        )


def _settings_of(model: object, wanted: Recipe, *, resume: bool) -> dict[str, Any]:
    """What a recipe says of a module that was passed: its class, and its size if it is one of ours."""
    if not isinstance(model, nn.Module):
        raise VitralError(
            f"model is the callable {one_line(repr(model))}; training takes a module that is already built"
        )
    named = {"model": f"{MODULE}{type(model).__name__}"}
    if resume or wanted.get("img_size") or not isinstance(model, VisionTransformer):
        return named
    return {**named, "img_size": model.config.img_size}
