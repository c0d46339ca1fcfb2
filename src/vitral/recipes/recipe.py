"""`Recipe`: the settings of a run; `resolve` picks what the user left open, `start` builds the model."""

from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field

from vitral.checkpoints.folder import Checkpoint, is_checkpoint, load_checkpoint
from vitral.data.image_data import ImageData
from vitral.data.split import class_counts
from vitral.data.workers import worker_count
from vitral.images.augment import Augmentation, Crop
from vitral.images.preprocess import Preprocess
from vitral.model.config import Pooling, ViTConfig, height_and_width
from vitral.model.variants import configure, parse
from vitral.model.vit import VisionTransformer
from vitral.runtime.devices import Device, Precision, compiles
from vitral.runtime.errors import VitralError
from vitral.runtime.ranges import (
    Batch,
    Budget,
    Count,
    NotNegative,
    Part,
    Pixels,
    Positive,
    Seed,
    Share,
    Strength,
    Threads,
    Whole,
    Workers,
)
from vitral.runtime.settings import check, nested, read_toml

OptimizerName = Literal["adamw", "muon", "lion", "sgd", "schedule_free"]
Schedule = Literal["cosine", "linear", "wsd", "constant"]
Loss = Literal["cross_entropy", "binary"]  # "binary": each class for itself, for several labels an image
Trained = Literal["all", "head", "lora"]


@dataclass(frozen=True)
class Recipe:
    """Settings of a run. None means: chosen from the data by `resolve`."""

    # A variant's name, a checkpoint to fine-tune, or "auto": whichever of the candidates, and of a model from
    # scratch, does best in short trials.
    model: str | None = None
    candidates: tuple[str, ...] = ("hf://facebook/dinov2-small",)  # checkpoints that model="auto" tries
    img_size: Pixels | tuple[Pixels, Pixels] | None = None  # pixels, one number or [height, width]
    pooling: Pooling | None = None  # None: as the variant has it
    dropout: Share = 0.0
    drop_path: Share = 0.0  # stochastic depth of the last layer
    # Other fields of `ViTConfig`.
    architecture: dict[str, Any] = field(default_factory=dict, metadata={"fields_of": ViTConfig})
    whiten: bool | None = None  # begin a new stem with filters that whiten the data's pixels
    # Share of the budget, from its start, over which images grow from half to the whole of the size, as in
    # progressive learning (EfficientNetV2, arXiv:2104.00298, §4).
    small_images: Share | None = None
    # Whether a trained model's new head begins as its linear probe, where each image shows one class.
    probe_head: bool | None = None
    # What learns: everything, a new "head" alone, or "lora" and the head. None: everything, or what trials
    # find better where the budget is in minutes.
    trained: Trained | None = None
    lora_rank: Annotated[int, Field(ge=1, le=4096)] = 16  # of "lora" (arXiv:2106.09685)

    # The budget: the first of these that is reached ends the run, and the schedule is laid out for it.
    epochs: Budget | None = None
    steps: Count | None = None
    minutes: Budget | None = None

    optimizer: OptimizerName | None = None
    learning_rate: Positive | None = None  # at its peak
    learning_rate_batch: Batch | None = None  # batch that it is meant for; None: for any. Scaled linearly
    schedule: Schedule | None = None
    warmup: Share | None = None  # share of the budget over which the learning rate rises from 0
    decay: Share = 0.2  # share of the budget over which the schedule "wsd" falls at the end
    final_share: Whole = 0.0  # of the peak rate, at the end
    weight_decay: Annotated[float, Field(ge=0, le=100)] | None = (
        None  # of weight matrices; biases, norms, tokens, positions have none
    )
    layer_decay: Part | None = None  # learning rate from layer to layer down
    betas: tuple[Share, Share] = (0.9, 0.999)  # of Adam and Lion; SGD's momentum is the first
    muon_momentum: Share = 0.95
    clip_norm: Strength = 1.0  # largest norm of all gradients together; 0: no limit
    ema_decay: Share | None = None  # of the averaged weights: those that are evaluated and kept

    batch_size: Batch | None = None
    accumulate: Batch = 1  # parts that a batch is computed in, one after the other, to fit the memory
    checkpoint_layers: bool = False  # computes activations twice rather than keep them (arXiv:1604.06174)

    loss: Loss | None = None  # None: "binary" for data with several classes an image, else "cross_entropy"
    label_smoothing: Share | None = None  # of the targets, spread over all classes
    class_weights: Literal["none", "balanced"] = "none"  # "balanced": rare classes weigh more in the loss
    sampling: Literal["shuffled", "balanced"] = "shuffled"  # "balanced": each class is drawn as often
    teacher: str | None = None  # a checkpoint with the same labels, to distil from
    distillation: Literal["hard", "soft"] = "hard"  # its labels or its probabilities (DeiT, arXiv:2012.12877)
    distillation_share: Whole = 0.5  # of the loss that is the teacher's
    distillation_temperature: Annotated[float, Field(ge=0.01, le=1000)] = 3.0  # of "soft"

    crop: Crop | None = None  # "padded", "resized", "simple" or "none"
    crop_scale: Part = 0.35  # smallest part of the area for "resized"
    # Centre kept in evaluation; None: in fine-tuning the checkpoint's, else 0.9 for "resized" and 1.
    crop_fraction: Part | None = None
    flip: bool | None = None
    three_augment: bool = False  # DeiT-III's: grey, solarized or blurred
    color_jitter: Annotated[float, Field(ge=0, le=10)] = (
        0.0  # largest change of brightness, contrast and saturation; 0 is off
    )
    rand_augment: Annotated[float, Field(ge=0, le=30)] | None = None  # magnitude, 30 for level 10; 0 is off
    rand_augment_ops: Annotated[int, Field(ge=1, le=20)] = 2
    rand_augment_share: Part = 1.0  # probability of each operation
    erasing: Share = 0.0  # probability of a rectangle of noise
    repeats: Annotated[int, Field(ge=1, le=1000)] = (
        1  # times that an image is taken in a row, each time altered anew
    )
    mixup: Strength = 0.0  # alpha; 0 is off
    cutmix: Strength | None = None  # alpha; 0 is off. With both on, each batch takes one by chance
    # Passes over the images after which every batch is mixed; until then the probability grows evenly.
    mix_passes: NotNegative | None = None

    val_fraction: Share = 0.2  # held out where the data has no validation split
    max_damaged: Share = 0.01  # share of unreadable images past which the run stops
    seed: Seed = 0
    eval_epochs: Count = 1  # passes between evaluations; on a GPU one may take less than a second
    checkpoint_steps: Count | None = None  # between checkpoints to resume from; None: an epoch
    keep_state: bool = False  # of the optimizer, once the run is finished, to go on with a larger budget
    workers: Workers | None = None  # processes that load images
    threads: Threads | None = None  # of the CPU; None: as many as torch takes, and on resume as the run had
    device: Device = "auto"
    precision: Precision = "auto"
    compile: bool | None = None  # torch.compile; None: where it is faster

    def __post_init__(self) -> None:
        check(self)

    @property
    def augmentation(self) -> Augmentation:
        """Of a resolved recipe."""
        return Augmentation(**{part.name: getattr(self, part.name) for part in fields(Augmentation)})


# --- What the user left open ---------------------------------------------------------------------


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
# Packaged recipes: TOML files of settings.
RECIPES = Path(__file__).parent


# What goes with an optimizer that is not the packaged recipe's. Lion's rate is a tenth of AdamW's
# (arXiv:2302.06675, §5), SGD's and its lack of decay are the paper's (table 4); a schedule-free average takes
# the place of a fall (arXiv:2405.15682).
_SCRATCH_WITH: dict[str, dict[str, Any]] = {
    "adamw": {"learning_rate": 2e-3, "schedule": "cosine"},
    "lion": {"learning_rate": 2e-4, "schedule": "cosine"},
    "sgd": {"learning_rate": 0.1, "schedule": "cosine", "weight_decay": 5e-4},
    "schedule_free": {"learning_rate": 4e-3, "schedule": "constant"},
}
_TUNING_WITH: dict[str, dict[str, Any]] = {
    "muon": {},  # its updates are as large as AdamW's
    "lion": {"learning_rate": 1.5e-5},
    "sgd": {"learning_rate": 0.03, "weight_decay": 0.0},
    "schedule_free": {"learning_rate": 3e-4, "schedule": "constant"},
}


def resolve(recipe: Recipe, data: ImageData, cpu_count: int) -> Recipe:
    """The recipe with every None that a run needs replaced, from the data and a packaged recipe.

    That is ``finetune`` where the model is a checkpoint, else ``small``.

    Raises:
        VitralError: if the model is unknown, the batch larger than the data, or a setting for one class
            an image only.
    """
    train = data.split("train")
    if data.multi_label:
        _refuse_one_class_only(recipe, data)
    base = load_checkpoint(recipe.model) if recipe.model and is_checkpoint(recipe.model) else None
    if recipe.trained not in (None, "all") and base is None:
        raise VitralError(f"trained={recipe.trained} adapts a trained model; name one with model=CHECKPOINT")
    if recipe.whiten and base is not None:
        raise VitralError(f"whiten=true begins a new stem, and {recipe.model} is trained; leave it out")
    choices = _choices(recipe, data, base, cpu_count)
    resolved = replace(recipe, **{k: value for k, value in choices.items() if getattr(recipe, k) is None})
    if base is None or base.labels == data.classes or not _can_be_probed(data):
        resolved = replace(resolved, probe_head=False)
    assert resolved.batch_size is not None
    if resolved.batch_size > len(train):
        raise VitralError(_batch_too_large(resolved, len(train), choices["batch_size"]))
    return resolved


def _batch_too_large(recipe: Recipe, images: int, usual: int) -> str:
    most = 2 ** (images.bit_length() - 1)
    usual = min(usual, most)
    more = f", or {most} at most" if most > usual else ""
    if recipe.learning_rate_batch is None:
        rate = f"learning_rate stays {recipe.learning_rate:g} unless you change it"
    else:
        rate = (
            f"learning_rate, {recipe.learning_rate:g} for {recipe.learning_rate_batch:,}, follows by itself"
        )
    return (
        f"batch_size={recipe.batch_size} is more than the {images:,} training images; "
        f"set batch_size={usual}, as Vitral would here{more}; {rate}"
    )


def _choices(recipe: Recipe, data: ImageData, base: Checkpoint | None, cpu_count: int) -> dict[str, Any]:
    """What a run takes where the user says nothing; `base` is the model to tune, if there is one."""
    train = data.split("train")
    side = float(np.median(train.typical_sizes.min(axis=1)))
    model, img_size = (recipe.model, base.preprocess.img_size) if base else _new_model(recipe.model, side)
    smallest = min(height_and_width(recipe.img_size or img_size))
    few = base is None and len(train) <= _FEW_IMAGES
    choices: dict[str, Any] = {
        **read_toml(RECIPES / ("finetune.toml" if base else "small.toml")),
        "model": model,
        "trained": "all",
        "img_size": img_size,
        "crop": "padded" if side < 1.5 * smallest else "resized",
        "flip": data.mirror_safe,
        "rand_augment": 9.0 if few and data.mirror_safe else 0.0,
        "loss": "binary" if data.multi_label else "cross_entropy",
        "batch_size": min(int(np.clip(2 ** round(np.log2(len(train) / 30)), 8, 64)), len(train)),
        "workers": worker_count(cores=cpu_count),
    }
    if recipe.trained not in (None, "all"):
        choices["learning_rate"] *= _FEWER_WEIGHTS_FASTER
    if recipe.optimizer is not None and recipe.optimizer != choices["optimizer"]:
        choices |= (_TUNING_WITH if base else _SCRATCH_WITH)[recipe.optimizer]
    if recipe.teacher is not None or compiles(recipe.device, wanted=recipe.compile):
        # The teacher's patches may not divide them; to compile for each size takes longer than it saves.
        choices["small_images"] = 0.0
    if recipe.epochs is recipe.steps is recipe.minutes is None:
        choices["epochs"] = 20.0 if base else _epochs_from_scratch(len(train))
    return choices


def _refuse_one_class_only(recipe: Recipe, data: ImageData) -> None:
    several = f"one class an image, and {data.source} has lists of labels"
    if recipe.loss == "cross_entropy":
        raise VitralError(f"loss=cross_entropy is for {several}; take loss=binary, or leave it out")
    if recipe.teacher is not None:
        raise VitralError(f"teacher={recipe.teacher}: distillation is for {several}; leave teacher out")


def _epochs_from_scratch(images: int) -> float:
    """1.5 million samples, within 30 to 200 passes over the images."""
    return float(np.clip(round(1.5e6 / images), 30, 200))


def _can_be_probed(data: ImageData) -> bool:
    """Whether each image shows one class, and each class has an image."""
    labels = data.split("train").labels
    return not data.multi_label and bool(class_counts(labels, len(data.classes)).all())


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
        raise VitralError(f"model={name} is no checkpoint, and {error}") from error


def start(recipe: Recipe, classes: tuple[str, ...]) -> Checkpoint:
    """The model that a resolved recipe starts from, its preprocessing and the data's labels.

    Raises:
        VitralError: if the settings do not fit each other.
    """
    assert recipe.model is not None
    assert recipe.img_size is not None
    overrides: dict[str, Any] = {
        "img_size": height_and_width(recipe.img_size),
        "dropout": recipe.dropout,
        "drop_path": recipe.drop_path,
    }
    if recipe.pooling is not None:
        overrides["pooling"] = recipe.pooling
    overrides |= nested(recipe.architecture)
    if "num_classes" in overrides:
        raise VitralError("architecture.num_classes is the number of the data's classes; leave it out")
    if is_checkpoint(recipe.model):
        base = _start_from(recipe.model, overrides, classes)
        if recipe.crop_fraction is None:
            return base
        return replace(base, preprocess=replace(base.preprocess, crop_fraction=recipe.crop_fraction))
    try:
        config = configure(recipe.model, {**overrides, "num_classes": len(classes)})
        model = VisionTransformer.from_config(config)
    except VitralError as error:
        raise VitralError(f"model={error}") from error
    except ValueError as error:
        raise VitralError(f"model={recipe.model}: {error}") from error
    margin = recipe.crop_fraction or (0.9 if recipe.crop == "resized" else 1.0)
    preprocess = Preprocess(overrides["img_size"], crop_fraction=margin).for_channels(config.in_channels)
    return Checkpoint(model, _of_pictures(preprocess), classes)


def _of_pictures(preprocess: Preprocess) -> Preprocess:
    """Raises VitralError for channels that pictures have not."""
    if preprocess.channels not in (1, 3):
        raise VitralError(
            f"a model of {preprocess.channels} channels cannot be trained on pictures, which have 3, or 1 "
            "where they are grey; leave architecture.in_channels out, or set it to 1"
        )
    return preprocess


def _start_from(folder: str, overrides: dict[str, Any], classes: tuple[str, ...]) -> Checkpoint:
    base = load_checkpoint(folder, **overrides)
    if base.labels != classes:
        base.model.reset_classifier(len(classes))
    carried = {name: base.metadata[name] for name in ("source", "licence", "origin") if name in base.metadata}
    preprocess, about = _of_pictures(base.preprocess), {"base": folder, **carried}
    return Checkpoint(base.model.train(), preprocess, classes, about, notes=base.notes)
