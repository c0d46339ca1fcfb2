"""`vitral.train`: a run from Python, and at its end the report that its recipe asks for."""

import warnings
from collections.abc import Callable, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

from vitral.data.image_data import DataSource, open_data
from vitral.recipes.recipe import Recipe
from vitral.reports.report import report
from vitral.runtime.errors import VitralError
from vitral.runtime.world import joined
from vitral.training import interface
from vitral.training.events import Listener
from vitral.training.run_folder import RunFolder
from vitral.training.state import Summary

REPORT_FILE = "report.html"  # in a run's folder


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
    how: dict[str, Any] = {"recipe": recipe, "resume": resume, "listeners": listeners}
    with joined() as world:
        summary = interface.train(data, out, **how, **settings)
        if summary.finished and world.is_first:
            write_if_asked(data, Path(out), warnings.warn)
    return summary


def write_if_asked(data: DataSource, folder: Path, warn: Callable[[str], None]) -> Path | None:
    """Write the report of a finished run into its folder if its recipe says so; a failure is only told.

    Args:
        data: that the run was trained on.
        folder: of the run.
        warn: told why no report could be written; the run is as good without it.

    Returns:
        The file; None if none was written.
    """
    try:
        recipe = RunFolder(folder).recipe()
        if not recipe.course.report:
            return None
        images = open_data(data, **recipe.opening)
        where: dict[str, Any] = {"device": recipe.machine.device, "precision": recipe.machine.precision}
        report(folder, images, **where).write(folder / REPORT_FILE)
    except VitralError as error:
        warn(f"no report was written: {error}")
        return None
    return folder / REPORT_FILE
