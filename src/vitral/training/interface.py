"""`vitral.train`: a run from Python, whose settings are keywords."""

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
    """Train or fine-tune a model; settings that are left out are chosen from the data.

    Args:
        data: as `open_data` takes it. Where it has no validation images, `val_fraction` and `seed` of the
            settings say which are held out.
        out: a folder, which becomes a model folder: `vitral.load` reads it.
        recipe: a recipe that comes with Vitral, a file of settings, or a `Recipe`.
        resume: go on with the run in `out`; callables are passed again, and None takes a setting back to its
            default.
        listeners: functions of one event, told of the run's course (`vitral.training.events`).
        settings: of `vitral.recipes.schema`, such as ``minutes=30, model="ViT-S/16", batch_size=64``, laid
            over the recipe; `model` may be a module, `loss` and `optimizer` callables, and `transform` and
            `prepare` are, as `vitral.training.parts.Parts` describes them. A module needs an `img_size`.

    Returns:
        How the run ended: its steps, its best validation score, and the figures of the test images if the
        data has any.

    Raises:
        VitralError: if a setting, the data or the folder cannot be used, or the loss is lost.
    """
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
        begun = changed(RunFolder(folder).recipe(), wanted)
        return open_data(data, val_fraction=begun.images.val_fraction, seed=begun.course.seed)
    return open_data(data, val_fraction=wanted.get("val_fraction"), seed=wanted.get("seed"))
