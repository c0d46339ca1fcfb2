"""A run from Python, whose settings are keywords; `vitral.reports.train` is its door."""

from collections.abc import Sequence
from dataclasses import fields
from os import PathLike
from pathlib import Path
from typing import Any

from torch import nn

from vitral.checkpoints.formats.damage import one_line
from vitral.data.image_data import DataSource, ImageData, open_data
from vitral.model.vit import VisionTransformer
from vitral.recipes import packaged
from vitral.recipes.recipe import Recipe
from vitral.recipes.resolve import MODULE
from vitral.runtime.errors import VitralError
from vitral.training.choose import train as run_training
from vitral.training.events import Listener
from vitral.training.parts import Parts
from vitral.training.run_folder import RunFolder, changed
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
    begin = recipe if isinstance(recipe, Recipe) else Recipe(**packaged.read(str(recipe)) if recipe else {})
    wanted = begin.changed(**{name: value for name, value in settings.items() if name not in parts})
    if "model" in parts:
        wanted = wanted.changed(**_settings_of(parts["model"], wanted, resume=resume))
    folder = Path(out)
    images = _images(data, folder, wanted, resume=resume)
    return run_training(images, folder, wanted, resume=resume, listeners=listeners, parts=Parts(**parts))


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


def _images(data: DataSource, folder: Path, wanted: Recipe, *, resume: bool) -> ImageData:
    """The images, and of them the validation images that the run holds out."""
    if resume:
        return open_data(data, **changed(RunFolder(folder).recipe(), wanted).opening)
    return open_data(data, **wanted.opening)
