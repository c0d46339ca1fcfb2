"""A run before its first step, new or taken up again: nothing is written before all is accepted."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vitral.checkpoints.folder import Checkpoint
from vitral.data.contents import Contents
from vitral.data.image_data import ImageData
from vitral.data.loader import Loader
from vitral.data.randomness import seeded
from vitral.data.subsets import thinned
from vitral.images.preprocess import Preprocess
from vitral.model.embedding import ConvStem
from vitral.recipes.recipe import Recipe
from vitral.recipes.resolve import load_base, resolve, start
from vitral.recipes.schema import BUDGET, Resolved
from vitral.runtime.devices import Placement
from vitral.runtime.errors import VitralError
from vitral.runtime.threads import cpu_count, local_size, thread_count
from vitral.training.adapt import choose_trained
from vitral.training.listeners import Listeners
from vitral.training.optimizers import Group
from vitral.training.parts import Parts
from vitral.training.run import Run, groups_by_recipe, refuse_misfit, schedule_of
from vitral.training.run_folder import RunFolder
from vitral.training.saving import averaged_copy
from vitral.training.sharding import load, mapped, whole
from vitral.training.state import Record, Saved
from vitral.training.state_file import read_pieces

# Of the images that a stem's first filters are computed from: a patch has 27 numbers for each.
_WHITENING_PIXELS = 1_000_000
_WHITENING_BATCH = 256


# --- A new run -------------------------------------------------------------------------------------


def begin(data: ImageData, files: RunFolder, recipe: Recipe, tell: Listeners, parts: Parts) -> Run:
    """A new run; nothing is written yet.

    Raises:
        VitralError: if the settings do not fit each other or the data.
    """
    if files.world.size > 1 and not recipe.get("parts"):
        recipe = recipe.changed(parts=files.world.size)
    base = load_base(recipe)
    resolved = resolve(recipe, data, base, max(cpu_count() // local_size(), 1))
    refuse_misfit(resolved, files.world.size)
    checkpoint = first_checkpoint(resolved, data, base, parts.model)
    run = Run(resolved, data, checkpoint, _placement(resolved), files, tell, parts)
    run.state.data = data.split("train").fingerprint
    files.world.refuse_unlike(f"the training images of {data.source}", run.state.data)
    return run


def first_checkpoint(
    recipe: Resolved, data: ImageData, base: Checkpoint | None, module: nn.Module | None = None
) -> Checkpoint:
    """What a run begins with.

    Args:
        recipe: its settings.
        data: whose labels it takes.
        base: the model to tune, of `load_base`.
        module: the model, if it is the user's own.
    """
    with seeded(recipe.course.seed):
        checkpoint = start(recipe, data.classes, base, module)
    if recipe.start.whiten and isinstance(checkpoint.model.embedding.stem, ConvStem):
        _whiten(checkpoint.model.embedding.stem, data, checkpoint.preprocess)
    split: dict[str, Any] = {"val_fraction": recipe.images.val_fraction, "seed": recipe.course.seed}
    if data.held_out:
        split["held_out"] = data.split("val").fingerprint
    # Of the data, not of what the model was trained on before.
    carried = {name: value for name, value in checkpoint.metadata.items() if name != "columns"}
    metadata = {**carried, "data": data.source, **split, **data.columns.metadata()}
    return replace(checkpoint, metadata=metadata, multi_label=data.multi_label)


def _whiten(stem: ConvStem, data: ImageData, preprocess: Preprocess) -> None:
    """By training images; where none can be read, the run will say so."""
    count = -(-_WHITENING_PIXELS // math.prod(preprocess.img_size))
    images = thinned(data.split("train"), count)
    batches = list(Loader(images, preprocess).evaluation_batches(_WHITENING_BATCH))
    readable = [batch.images for batch in batches if len(batch.labels)]
    if readable:
        stem.whiten(torch.cat(readable))


def groups_of(asked: Recipe, data: ImageData) -> tuple[list[Group], list[str]]:
    """Give the parameter groups of a run that is not begun, and the names of what it would not train.

    Raises:
        VitralError: as `train`.
    """
    base = load_base(asked)
    recipe = resolve(asked, data, base, cpu_count())
    model = start(recipe, data.classes, base).model
    choose_trained(model, recipe.tuning.trained, recipe.tuning.lora_rank, recipe.course.seed)
    frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    rate = schedule_of(recipe).peak
    return [{**group, "lr": rate * group["scale"]} for group in groups_by_recipe(model, recipe)], frozen


# --- A run that is taken up again ------------------------------------------------------------------


def resumed(
    data: ImageData,
    files: RunFolder,
    recipe: Resolved,
    saved_recipe: Resolved,
    tell: Listeners,
    parts: Parts,
) -> Run:
    """A run taken up again.

    Args:
        data: as it began with, mostly.
        files: its folder.
        recipe: its settings from here on.
        saved_recipe: those of the session before.
        tell: told of what changed.
        parts: as it began with.

    Raises:
        VitralError: if there is nothing to go on with, or the data is another.
    """
    if files.finished and not files.has_state:
        raise _is_finished(files.path)
    placement, steps_per_epoch = _placement(recipe), _steps_per_epoch(data, recipe)
    device = placement.device if files.world.alone else torch.device("cpu")
    saved = files.saved(recipe.course.checkpoint_steps or steps_per_epoch, device)
    checkpoint = files.checkpoint_of(saved) if saved else None
    if checkpoint is None:
        base = load_base(Recipe(**recipe.settings()))
        checkpoint = first_checkpoint(recipe, data, base, parts.model)
    run = Run(recipe, data, checkpoint, placement, files, tell, parts)
    files.world.refuse_unlike(f"the training images of {data.source}", data.split("train").fingerprint)
    contents = files.world.from_first(lambda: Contents.of(data))
    if saved is None:
        tell.message(f"{files.path} has no checkpoint yet, and begins again")
        run.state.data = data.split("train").fingerprint
    else:
        _take_up(run, saved, saved_recipe)
        _tell_changes(run, contents)
    record = files.record or Record.of(recipe, thread_count(), contents)
    # A start is made again as a whole.
    files.go_on(replace(record, contents=contents), recipe, data.source, run.state.step or -1)
    if saved and saved.can_go_on:
        files.save_last(lambda: averaged_copy(run))
    return run


def threads_of(recipe: Resolved, files: RunFolder) -> int:
    """Gives the threads of a resumed run; says so if they are not those of this process."""
    wanted, here = recipe.machine.threads, thread_count()
    on_cpu = _placement(recipe).device.type == "cpu"
    began = files.record.threads if files.record is not None and on_cpu else None
    if began not in (None, here) and not wanted:
        files.tell(
            f"this run computes with {began} threads, as it began, not with the {here} of this process, "
            f"which would change its results in the last digits; threads={here} takes {here}"
        )
    return thread_count(wanted, began)


def _placement(recipe: Resolved) -> Placement:
    return Placement.choose(recipe.machine.device, recipe.machine.precision)


def _steps_per_epoch(data: ImageData, recipe: Resolved) -> int:
    images, batch_size = len(data.split("train")), recipe.batches.batch_size
    if batch_size > images:
        raise VitralError(
            f"{data.source} has only {images} training images now, and the run began with "
            f"batch_size={batch_size}; put them back"
        )
    return images // batch_size


def _take_up(run: Run, saved: Saved, saved_recipe: Resolved) -> None:
    """Puts a checkpoint into the run.

    Raises:
        VitralError: if there is nothing to go on with.
    """
    run.state, run.clock.seconds = saved.state, dict(saved.state.time)
    run.budget.take_up(saved.state)
    folder, spent = run.files.path, run.budget.is_spent
    if run.files.finished and (spent or not saved.can_go_on):
        raise _is_finished(folder, run.recipe if saved.can_go_on else None)
    now, before = vars(run.recipe.limits), vars(saved_recipe.limits)
    changes = [name for name in BUDGET if now[name] != before[name] and math.isfinite(now[name])]
    if spent and changes:
        asked = f"{changes[0]}={now[changes[0]]:g}"
        raise VitralError(
            f"{folder} is already at step {run.state.step}, past {asked}; name a larger budget, or none"
        )
    if saved.tensors or saved.folder:
        _load_tensors(run, saved)
    if not spent and not saved.can_go_on:
        raise _is_finished(folder)
    if run.state.best_merit >= 0 and not run.files.has_best:
        _replace_best(run, saved)


def _load_tensors(run: Run, saved: Saved) -> None:
    try:
        tensors = saved.tensors if saved.folder is None else _pieces(run, saved, saved.folder)
        load(run.model, tensors["model"])
        if saved.can_go_on:
            run.average.load_state_dict(mapped(whole, tensors["average"]))
            run.follow_average()
            run.optimizer.load_state_dict(tensors["optimizer"])
            run.loss_watch.load_state_dict(saved.state.loss_watch)
            run.recent.load_state_dict(saved.state.recent, run.mine)
    except (RuntimeError, ValueError, KeyError, TypeError) as error:
        raise VitralError(
            f"the state in {run.files.path}/checkpoints is not of this run's model; put its own back"
        ) from error


def _pieces(run: Run, saved: Saved, folder: Path) -> dict[str, Any]:
    """What several processes wrote, as this run is divided, or not."""
    here = run.model.state_dict()

    def like(name: str, size: torch.Size) -> Tensor | None:
        return here[name] if here[name].shape == size else None

    tensors = read_pieces(folder, like)
    kept = saved.tensors["optimizer"]
    for name, rest in kept["parameters"].items():
        tensors["optimizer"].setdefault(name, {}).update(rest)
    return {**tensors, "optimizer": {"parameters": tensors["optimizer"], "groups": kept["groups"]}}


def _replace_best(run: Run, saved: Saved) -> None:
    folder = run.files.path
    lost = f"the best weights in {folder}, of step {run.state.best_step}, are gone or damaged"
    if not saved.can_go_on:
        raise VitralError(f"{lost}; the last weights are still there: {folder / 'last'}")
    run.state.forget_best()
    run.tell.message(f"{lost}; the best weights from now on replace them")


def _is_finished(folder: Path, budget_of: Resolved | None = None) -> VitralError:
    """What to say; a run whose state is there can go on with more than the budget of its recipe."""
    if budget_of is not None:
        # A second limit beside the one that was reached would change nothing.
        had = ", ".join(f"{name}={value:g}" for name, value in budget_of.limits.given())
        return VitralError(f"{folder} is finished; name a larger budget to go on (it had {had})")
    return VitralError(
        f"{folder} is finished, and the optimizer's state was dropped then (keep_state=true keeps it for a "
        f"larger budget); to train on from its weights, begin a new run with model={folder}"
    )


def _tell_changes(run: Run, contents: Contents) -> None:
    """Says what of the data changed that may change. Raises VitralError for all else."""
    record = run.files.record
    if record is not None:
        for change in record.contents.changes(contents, run.data, run.files.path, record.damaged):
            run.tell.message(change)
    elif run.state.data != run.data.split("train").fingerprint:
        raise VitralError(
            f"{run.data.source} no longer holds the training images that {run.files.path} began with"
        )
