"""What a run works with, from what a user asks and the data; and the model that it begins with."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from torch import nn

from vitral.checkpoints.folder import Checkpoint, is_checkpoint, load_checkpoint
from vitral.data.image_data import ImageData
from vitral.data.split import class_counts
from vitral.data.workers import worker_count
from vitral.evaluation.task import SINGLE_LABEL, task_of
from vitral.images.preprocess import Preprocess
from vitral.model.config import height_and_width
from vitral.model.variants import configure, parse
from vitral.model.vit import VisionTransformer
from vitral.recipes.optimizers import OPTIMIZERS
from vitral.recipes.recipe import Recipe
from vitral.recipes.schema import BUDGET, RECIPES, Resolved, Start
from vitral.runtime.devices import compiles
from vitral.runtime.errors import VitralError
from vitral.runtime.settings import nested, read_toml


@dataclass(frozen=True)
class _Scale:
    """A model for images whose shorter side is typically `up_to` pixels or less."""

    up_to: float
    model: str
    img_size: int | None  # None: the images' own size, rounded to the patch


# Hybrids, for a small data set cannot teach a plain ViT locality (the paper, §4.3 and figure 4).
_SCALES = (
    _Scale(12, "Conv+ViT-Pico/4", 16),
    _Scale(48, "Conv+ViT-Pico/4", None),
    _Scale(100, "Conv+ViT-Pico/8", 64),
    _Scale(float("inf"), "Conv+ViT-Ti/16", 128),
)
# From scratch so few are learnt by heart: with 900 of CIFAR-10's, RandAugment was worth two points
# (docs/log.md, 2026-11-26).
_FEW_IMAGES = 5000
# Adapters and heads learn at a higher rate than all weights: 75 % at 1.5e-3, 71 at 1.5e-4 (docs/log.md,
# 2026-11-26).
_FEWER_WEIGHTS_FASTER = 7.5
# Before the name of a class, as `model` of a recipe: a module that is passed in Python.
MODULE = "module:"
# What goes with one, where nothing is known of its matrices and its patches, nor whether it can be compiled.
_WITH_MODULE: dict[str, Any] = {
    "optimizer": "adamw",
    **OPTIMIZERS["adamw"].from_scratch,
    "whiten": False,
    "small_images": 0.0,
    "compile": False,
}
# Settings that ask for our model, at the values that ask for nothing.
_OF_OUR_MODEL: dict[str, Any] = {
    "architecture": {}, "pooling": "", "dropout": 0.0, "drop_path": 0.0, "whiten": False, "small_images": 0.0,
    "trained": "all", "probe_head": False, "layer_decay": 1.0, "checkpoint_layers": False,
}  # fmt: skip
# Settings that change fields of `ViTConfig`.
_OF_THE_MODEL = ("dropout", "drop_path", "pooling", "architecture")


# --- The model to tune -----------------------------------------------------------------------------


def load_base(recipe: Recipe) -> Checkpoint | None:
    """The checkpoint that a recipe tunes, at its size and with its architecture; None where it names none.

    Raises:
        VitralError: if it cannot be read so.
    """
    model = recipe.get("model")
    if not model or not is_checkpoint(model):
        return None
    overrides = _architecture({name: recipe.get(name) for name in _OF_THE_MODEL})
    if recipe.get("img_size"):
        return load_checkpoint(model, img_size=height_and_width(recipe.get("img_size")), **overrides)
    base = load_checkpoint(model, **overrides)
    size = base.preprocess.img_size
    # Some checkpoints prepare images at another size than that of their positions.
    return base if size == base.model.config.img_size else load_checkpoint(model, img_size=size, **overrides)


def _architecture(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of `ViTConfig` that a recipe changes."""
    fields = {"dropout": settings["dropout"], "drop_path": settings["drop_path"]}
    if settings["pooling"]:
        fields["pooling"] = settings["pooling"]
    fields |= nested(settings["architecture"])
    if "num_classes" in fields:
        raise VitralError("architecture.num_classes is the number of the data's classes; leave it out")
    return fields


# --- What the user left open -----------------------------------------------------------------------


def resolve(recipe: Recipe, data: ImageData, base: Checkpoint | None, cpu_count: int) -> Resolved:
    """What a run works with: the recipe, the rest chosen from the data and from a packaged recipe.

    That is ``finetune`` where the model is a checkpoint, else ``small``.

    Args:
        recipe: what the user asks.
        data: with a "train" split.
        base: the model to tune, of `load_base`.
        cpu_count: cores that may be used.

    Raises:
        VitralError: if the model is unknown, the batch larger than the data, or a setting for one class
            an image only.
    """
    _refuse_misfits(recipe, data, base)
    choices = _choices(recipe, data, base, cpu_count)
    resolved = Resolved.of({**choices, **recipe.given})
    if base is None or base.labels == data.classes or not _can_be_probed(data):
        resolved = resolved.changed(probe_head=False)
    images = len(data.split("train"))
    if resolved.batches.batch_size > images:
        raise VitralError(_batch_too_large(resolved, images, choices["batch_size"]))
    return resolved


def _refuse_misfits(recipe: Recipe, data: ImageData, base: Checkpoint | None) -> None:
    trained, teacher = recipe.get("trained"), recipe.get("teacher")
    if _is_module(recipe.get("model")):
        _refuse_ours(recipe)
    if trained not in (None, "all") and base is None:
        raise VitralError(f"trained={trained} adapts a trained model; name one with model=CHECKPOINT")
    if recipe.get("whiten") and base is not None:
        raise VitralError(
            f"whiten=true begins a new stem, and {recipe.get('model')} is trained; leave it out"
        )
    if recipe.get("sampling") == "blocks" and data.split("train").blocks is None:
        raise VitralError(
            f"sampling=blocks is for parquet files and shards, and each image of {data.source} is read by "
            "itself; leave it out"
        )
    if task_of(data) is SINGLE_LABEL:
        return
    several = f"one class per image, and {data.source} has lists of labels"
    if recipe.get("loss") == "cross_entropy":
        raise VitralError(f"loss=cross_entropy is for {several}; take loss=binary, or leave it out")
    if teacher:
        raise VitralError(f"teacher={teacher}: distillation is for {several}; leave teacher out")


def _refuse_ours(recipe: Recipe) -> None:
    """Raises VitralError for what a module of the user's own cannot be asked, or if its size is unknown."""
    name = recipe.get("model").removeprefix(MODULE)
    optimizer = recipe.get("optimizer")
    if optimizer is not None and OPTIMIZERS[optimizer].takes_matrices:
        raise VitralError(
            f"optimizer={optimizer} does not know which matrices of a {name} are hidden; take adamw"
        )
    for setting, nothing in _OF_OUR_MODEL.items():
        if (value := recipe.given.get(setting, nothing)) != nothing:
            raise VitralError(f"{setting}={value} is for Vitral's models, not for a {name}; leave it out")
    if not recipe.get("img_size"):
        raise VitralError(f"nothing says what images a {name} takes; name their size: img_size=32")


def _batch_too_large(recipe: Resolved, images: int, usual: int) -> str:
    most = 2 ** (images.bit_length() - 1)
    usual = min(usual, most)
    more = f", or {most} at most" if most > usual else ""
    rate = recipe.rate
    if rate.learning_rate_batch:
        follows = f"{rate.learning_rate:g} for {rate.learning_rate_batch:,}, follows by itself"
        advice = f"learning_rate, {follows}"
    else:
        advice = f"learning_rate stays {rate.learning_rate:g} unless you change it"
    return (
        f"batch_size={recipe.batches.batch_size} is more than the {images:,} training images; "
        f"set batch_size={usual}, as Vitral would here{more}; {advice}"
    )


def _choices(recipe: Recipe, data: ImageData, base: Checkpoint | None, cpu_count: int) -> dict[str, Any]:
    """What a run takes where the user says nothing; `base` is the model to tune, if there is one."""
    train, asked = data.split("train"), recipe.get
    side = float(np.median(train.typical_sizes.min(axis=1)))
    module = _is_module(asked("model"))
    if base:
        model, img_size = asked("model"), base.preprocess.img_size
    elif module:
        model, img_size = asked("model"), asked("img_size")
    else:
        model, img_size = _new_model(asked("model"), side)
    smallest = min(height_and_width(asked("img_size") or img_size))
    few = base is None and len(train) <= _FEW_IMAGES
    choices: dict[str, Any] = {
        **read_toml(RECIPES / ("finetune.toml" if base else "small.toml")),
        "model": model,
        "img_size": img_size,
        "crop": "padded" if side < 1.5 * smallest else "resized",
        "flip": data.mirror_safe,
        "rand_augment": 9.0 if few and data.mirror_safe else 0.0,
        "decoding": "fast",
        "loss": task_of(data).loss,
        "batch_size": min(int(np.clip(2 ** round(np.log2(len(train) / 30)), 8, 64)), len(train)),
        "workers": worker_count(cores=cpu_count),
        "sampling": "blocks" if train.blocks is not None and train.blocks.thrashes else "shuffled",
        **(_WITH_MODULE if module else {}),
    }
    if asked("trained") not in (None, "all"):
        choices["learning_rate"] *= _FEWER_WEIGHTS_FASTER
    if asked("optimizer") not in (None, choices["optimizer"]):
        row = OPTIMIZERS[asked("optimizer")]
        choices |= row.tuning if base else row.from_scratch
    wanted = None if asked("compile") == "auto" else asked("compile")
    if asked("teacher") or compiles(asked("device"), wanted=wanted):
        # The teacher's patches may not divide them; to compile for each size takes longer than it saves.
        choices["small_images"] = 0.0
    if not any(asked(limit) for limit in BUDGET):
        choices["epochs"] = 20.0 if base else _epochs_from_scratch(len(train))
    return choices


def _epochs_from_scratch(images: int) -> float:
    """1.5 million samples, within 30 to 200 passes over the images."""
    return float(np.clip(round(1.5e6 / images), 30, 200))


def _is_module(model: str | None) -> bool:
    """Whether a recipe's model is a module that is passed in Python."""
    return bool(model) and model.startswith(MODULE)


def _can_be_probed(data: ImageData) -> bool:
    """Whether each image shows one class, and each class has an image."""
    labels = data.split("train").labels
    return task_of(data) is SINGLE_LABEL and bool(class_counts(labels, len(data.classes)).all())


def _new_model(model: str | None, side: float) -> tuple[str, int | tuple[int, int]]:
    """The variant to train and its image size, from what the user named and the images' shorter side."""
    scale = next(scale for scale in _SCALES if side <= scale.up_to)
    name = model or scale.model
    named = _parse(name)
    if "@" in name:
        return name, named.img_size
    patch = named.patch_size
    wanted = scale.img_size or side
    return name, max(round(wanted / patch), 2) * patch


def _parse(name: str) -> Any:
    try:
        return parse(name)
    except ValueError as error:
        raise VitralError(f"model={name} is not a checkpoint, and {error}") from error


# --- The model that a run begins with --------------------------------------------------------------


def start(
    recipe: Resolved, classes: tuple[str, ...], base: Checkpoint | None, module: nn.Module | None = None
) -> Checkpoint:
    """The model that a run begins with, its preprocessing and the data's labels.

    Args:
        recipe: its settings.
        classes: the labels.
        base: the model to tune, of `load_base`; it becomes the run's.
        module: the model, if it is the user's own.

    Raises:
        VitralError: if the settings do not fit each other.
    """
    crop_fraction = recipe.alteration.crop_fraction
    if base is None:
        margin = crop_fraction or (0.9 if recipe.alteration.crop == "resized" else 1.0)
        if _is_module(recipe.start.model):
            return _of_module(recipe.start, module, classes, margin)
        return _from_scratch(recipe.start, classes, margin)
    if base.labels != classes:
        base.model.reset_classifier(len(classes))
    preprocess = _of_pictures(base.preprocess)
    if crop_fraction:
        preprocess = replace(preprocess, crop_fraction=crop_fraction)
    carried = {name: base.metadata[name] for name in ("source", "licence", "origin") if name in base.metadata}
    about = {"base": recipe.start.model, **carried}
    return Checkpoint(base.model.train(), preprocess, classes, about, notes=base.notes)


def _from_scratch(settings: Start, classes: tuple[str, ...], crop_fraction: float) -> Checkpoint:
    size = height_and_width(settings.img_size)
    changes = {**_architecture(vars(settings)), "img_size": size, "num_classes": len(classes)}
    try:
        config = configure(settings.model, changes)
        model = VisionTransformer.from_config(config)
    except VitralError as error:
        raise VitralError(f"model={error}") from error
    except ValueError as error:
        raise VitralError(f"model={settings.model}: {error}") from error
    preprocess = Preprocess(size, crop_fraction=crop_fraction).for_channels(config.in_channels)
    return Checkpoint(model, _of_pictures(preprocess), classes)


def _of_module(
    settings: Start, module: nn.Module | None, classes: tuple[str, ...], crop_fraction: float
) -> Checkpoint:
    if module is None:
        name = settings.model.removeprefix(MODULE)
        raise VitralError(
            f"model={settings.model} is a module of your own code; in Python, pass one: "
            f"vitral.train(..., model={name}(...))"
        )
    model: Any = module
    return Checkpoint(
        model, Preprocess(height_and_width(settings.img_size), crop_fraction=crop_fraction), classes
    )


def _of_pictures(preprocess: Preprocess) -> Preprocess:
    """Raises VitralError for channels that pictures have not."""
    if preprocess.channels not in (1, 3):
        raise VitralError(
            f"a model of {preprocess.channels} channels cannot be trained on pictures, which have 3, or 1 "
            "where they are grey; leave architecture.in_channels out, or set it to 1"
        )
    return preprocess
