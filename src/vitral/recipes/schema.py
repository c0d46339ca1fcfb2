"""Every setting of a run: its name, type, range and default, in small groups.

`Resolved` is what a run works with: each setting has a value. What `vitral.recipes.resolve` chooses for each
run, unless the user says it, has no default here, or one that files of older runs without it are read with.

Each setting has a comment for its user, at the end of its line or above it; docs/recipes.md repeats them all.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_type_hints

from pydantic import BeforeValidator, Field

from vitral.data.columns import Columns
from vitral.images.augmentation import Augmentation, Crop
from vitral.images.preprocess import Decoding
from vitral.model.config import Pooling, ViTConfig
from vitral.runtime.devices import Device, Precision
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
    listed,
)

# Packaged recipes: TOML files of settings.
RECIPES = Path(__file__).parent

OptimizerName = Literal["adamw", "muon", "lion", "sgd", "schedule_free"]
ScheduleName = Literal["cosine", "linear", "wsd", "constant"]
Loss = Literal["cross_entropy", "binary"]
Trained = Literal["all", "head", "lora"]
Tracker = Literal["tensorboard", "wandb", "mlflow"]


# Of a field whose default means that there is no such thing; a recipe's file leaves it out then.
_UNSET = {"unset": True}
# Of a field that is chosen for each run, and has a default only for files of older runs.
_CHOSEN = {"chosen": True}
_NO_LIMIT: Any = math.inf


# --- The groups ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Start:
    """The model that a run begins with."""

    # A variant's name, a checkpoint to fine-tune, or "auto": whichever of the candidates, and of a model from
    # scratch, does best in short trials.
    model: str
    img_size: Pixels | tuple[Pixels, Pixels]  # pixels, one number or [height, width]
    # What the head reads of the tokens; left out: as the model has it.
    pooling: Pooling | Literal[""] = field(default="", metadata=_UNSET)
    dropout: Share = 0.0  # probability, after each dense layer
    # Stochastic depth: share of the images that skip the last layer; earlier layers are skipped less often.
    drop_path: Share = 0.0
    # Other fields of `ViTConfig`, by dotted names: architecture.num_layers=6.
    architecture: dict[str, Any] = field(default_factory=dict, metadata={"fields_of": ViTConfig})
    # Begin a new stem with filters that whiten the data's pixels.
    whiten: bool = field(default=False, metadata=_CHOSEN)


@dataclass(frozen=True)
class Tuning:
    """What learns of a trained model."""

    candidates: tuple[str, ...] = ("hf://facebook/dinov2-small",)  # checkpoints that model="auto" tries
    # Whether a trained model's new head begins as its linear probe, where each image shows one class.
    probe_head: bool = field(default=False, metadata=_CHOSEN)
    # What learns: everything, a new head alone, or LoRA's matrices and the head. Left out: everything, or
    # what trials find better where the budget is in minutes.
    trained: Trained = field(default="all", metadata=_CHOSEN)
    lora_rank: Annotated[int, Field(ge=1, le=4096)] = 16  # rank of the matrices of "lora" (arXiv:2106.09685)


@dataclass(frozen=True)
class Limits:
    """The budget: the first limit that is reached ends the run, and the schedule is laid out for it."""

    # Passes over the training images; chosen from the data where there is no limit at all.
    epochs: Budget = field(default=_NO_LIMIT, metadata=_UNSET)
    steps: Count = field(default=_NO_LIMIT, metadata=_UNSET)  # updates of the weights
    # Minutes on this machine; the learning rate then follows the clock, and a second run differs a little.
    minutes: Budget = field(default=_NO_LIMIT, metadata=_UNSET)

    @property
    def timed(self) -> bool:
        """Whether time is a limit."""
        return math.isfinite(self.minutes)

    def given(self) -> list[tuple[str, float]]:
        """The limits that there are, by name."""
        return [(name, value) for name, value in vars(self).items() if math.isfinite(value)]


BUDGET = tuple(limit.name for limit in dataclasses.fields(Limits))


@dataclass(frozen=True)
class Optimization:
    """How gradients become updates."""

    optimizer: OptimizerName  # "muon": Muon for the matrices inside the encoder, AdamW for the rest
    weight_decay: Annotated[float, Field(ge=0, le=100)]  # weight matrices alone decay
    layer_decay: Part  # each layer's learning rate is this share of that of the layer above it
    ema_decay: Share  # memory of the averaged weights, which are evaluated and kept; 0: none
    betas: tuple[Share, Share] = (0.9, 0.999)  # of AdamW and Lion; SGD's momentum is the first
    muon_momentum: Share = 0.95  # Muon's momentum, Nesterov's
    clip_norm: Strength = 1.0  # largest norm of all gradients together; 0: no limit


@dataclass(frozen=True)
class Rate:
    """The learning rate and its course."""

    learning_rate: Positive  # the largest, after the warm-up
    schedule: ScheduleName  # how it falls; "wsd": level, then a line down at the end (arXiv:2404.06395)
    warmup: Share  # share of the budget over which the learning rate rises from 0
    # The batch that learning_rate is meant for; it is scaled linearly to others. Left out: for any batch.
    learning_rate_batch: Batch = field(default=0, metadata=_UNSET)
    decay: Share = 0.2  # share of the budget over which the schedule "wsd" falls at the end
    final_share: Whole = 0.0  # share of the peak learning rate that is left at the end


@dataclass(frozen=True)
class Batches:
    """How many images a step takes, and in which way."""

    batch_size: Batch  # images in a step
    # Share of the budget, from its start, over which images grow from half to the whole of the size, as in
    # progressive learning (EfficientNetV2, arXiv:2104.00298, §4).
    small_images: Share
    accumulate: Batch = 1  # pieces that a batch is computed in, one after the other, to fit the memory
    # Equal parts of a batch, each with random numbers of its own, that processes may share: so many processes
    # or fewer compute the same bits. Left out: as many as there are processes.
    parts: Annotated[int, Field(ge=1, le=65536)] = 1
    # Divide weights, gradients and the optimizer's state among the processes (FSDP2), for a model that is too
    # large for one.
    shard: bool = False
    # Compute activations twice rather than keep them, to save memory (arXiv:1604.06174).
    checkpoint_layers: bool = False


@dataclass(frozen=True)
class Criterion:
    """What is minimized."""

    loss: Loss  # "binary": each class for itself, for several labels per image
    label_smoothing: Share  # share of each target that is spread over all classes
    class_weights: Literal["none", "balanced"] = "none"  # "balanced": rare classes weigh more in the loss
    # A checkpoint with the same labels, which the model learns to answer like (DeiT, arXiv:2012.12877).
    teacher: str = field(default="", metadata=_UNSET)
    distillation: Literal["hard", "soft"] = "hard"  # the teacher's label or its probabilities
    distillation_share: Whole = 0.5  # the teacher's part of the loss
    distillation_temperature: Annotated[float, Field(ge=0.01, le=1000)] = 3.0  # temperature of "soft"


@dataclass(frozen=True)
class Alteration:
    """How training images are altered, each by itself."""

    # "resized": a random part, enlarged; "padded": shifted by up to an eighth; "simple": DeiT-III's.
    crop: Crop
    flip: bool  # mirror every other image
    rand_augment: Annotated[float, Field(ge=0, le=30)]  # RandAugment's magnitude, 30 for level 10; 0: off
    crop_scale: Part = 0.35  # smallest part of the area for "resized"
    # Share of each side that evaluation keeps. Left out: the checkpoint's, else 0.9 for "resized" and 1.
    crop_fraction: Part = field(default=0.0, metadata=_UNSET)
    three_augment: bool = False  # DeiT-III's: grey, solarized or blurred
    # Largest change of brightness, contrast and saturation; 0: off.
    color_jitter: Annotated[float, Field(ge=0, le=10)] = 0.0
    rand_augment_ops: Annotated[int, Field(ge=1, le=20)] = 2  # RandAugment's operations per image
    rand_augment_share: Part = 1.0  # probability of each of them
    erasing: Share = 0.0  # probability of a rectangle of noise

    @property
    def augmentation(self) -> Augmentation:
        return Augmentation(
            **{part.name: getattr(self, part.name) for part in dataclasses.fields(Augmentation)}
        )


@dataclass(frozen=True)
class Mixing:
    """How images of a batch are mixed."""

    cutmix: Strength  # CutMix's alpha; 0: off. With mixup on too, each batch takes one by chance
    mixup: Strength = 0.0  # Mixup's alpha; 0: off
    # Passes over the images after which every batch is mixed; until then the probability grows evenly.
    mix_passes: NotNegative = field(default=0.0, metadata=_CHOSEN)


@dataclass(frozen=True)
class Images:
    """Which images are trained on, and in which order."""

    # "balanced": each class is drawn as often; "blocks": shuffled, row groups or shards one after the other.
    sampling: Literal["shuffled", "balanced", "blocks"] = field(default="shuffled", metadata=_CHOSEN)
    # Times that an image is taken in a row, each time altered anew.
    repeats: Annotated[int, Field(ge=1, le=1000)] = 1
    val_fraction: Share = 0.2  # share to validate on, where the data has no validation split
    max_damaged: Share = 0.01  # share of unreadable images past which the run stops
    # How finely JPEGs are decoded to train on: "full"; "fast" and "fastest": each side divided by 2, 4 or 8
    # where at least 2 pixels, or 1, are left for each that the model sees.
    decoding: Decoding = field(default="full", metadata=_CHOSEN)
    # A table's column of the images: paths, or in parquet bytes. Left out, as the next ones: found by name.
    image_column: str = field(default="", metadata=_UNSET)
    # The column of the labels; several columns of 0 and 1, a class each, with commas between.
    label_column: str = field(default="", metadata=_UNSET)
    # What stands between several labels in one cell, such as " " or ";"; left out: a cell is one label.
    label_delimiter: str = field(default="", metadata=_UNSET)
    split_column: str = field(default="", metadata=_UNSET)  # the column that says train, val or test
    # The column of what must not stand in two splits, such as a patient; images are held out by the group.
    group_column: str = field(default="", metadata=_UNSET)
    # The folder that a table's paths begin from; left out: the table's own.
    image_root: str = field(default="", metadata=_UNSET)


@dataclass(frozen=True)
class Course:
    """The course of a run."""

    seed: Seed = 0  # all that is random follows from it
    eval_epochs: Count = 1  # passes between evaluations; on a GPU one may take less than a second
    # Steps between checkpoints to resume from; left out: an epoch.
    checkpoint_steps: Count = field(default=0, metadata=_UNSET)
    report: bool = False  # write a report of the run into its folder at its end, report.html
    keep_state: bool = False  # keep the optimizer's state after the end, to train on with more budget
    # What shows the run's figures elsewhere, as track=tensorboard,mlflow.
    track: Annotated[tuple[Tracker, ...], BeforeValidator(listed)] = ()


@dataclass(frozen=True)
class Machine:
    """What computes."""

    workers: Workers = field(default=0, metadata=_CHOSEN)  # processes that load images
    # Threads of the CPU; left out: as many as torch takes, and on resume as the run had.
    threads: Threads = field(default=0, metadata=_UNSET)
    device: Device = "auto"  # "auto": a GPU where there is one
    precision: Precision = "auto"  # type of the products; "auto": bfloat16 where the device multiplies in it
    compile: bool | Literal["auto"] = "auto"  # whether to use torch.compile; "auto": where it is faster

    @property
    def compile_wanted(self) -> bool | None:
        """What the user says of compiling; None: nothing."""
        return None if self.compile == "auto" else self.compile


# --- All of them -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Resolved:
    """The settings of a run, every one with a value."""

    start: Start
    tuning: Tuning
    limits: Limits
    optimization: Optimization
    rate: Rate
    batches: Batches
    criterion: Criterion
    alteration: Alteration
    mixing: Mixing
    images: Images
    course: Course
    machine: Machine

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> Self:
        """From settings by name, each checked already.

        Raises:
            VitralError: if one is `missing`.
        """
        if lost := missing(settings):
            raise VitralError(f"the settings have no {lost[0]}")
        return cls(**{name: kind(**_part(kind, settings)) for name, kind in _groups()})

    @property
    def opening(self) -> dict[str, Any]:
        """What `open_data` is told of the images."""
        return opening(self.settings().get)

    def settings(self) -> dict[str, Any]:
        """Every setting by name, in the order of the groups, those that are unset left out."""
        values = {
            part.name: getattr(getattr(self, name), part.name)
            for name, kind in _groups()
            for part in dataclasses.fields(kind)
        }
        return {name: value for name, value in values.items() if not is_unset(name, value)}

    def changed(self, **settings: Any) -> Self:
        """With other values, each checked already."""
        return type(self).of({**self.settings(), **settings})


def _groups() -> Iterator[tuple[str, Any]]:
    return ((group.name, group.type) for group in dataclasses.fields(Resolved))


def _part(kind: Any, settings: Mapping[str, Any]) -> dict[str, Any]:
    names = (part.name for part in dataclasses.fields(kind))
    return {name: settings[name] for name in names if name in settings}


# By name; no two groups share one.
FIELDS: dict[str, dataclasses.Field] = {
    part.name: part for _, kind in _groups() for part in dataclasses.fields(kind)
}


def missing(settings: Mapping[str, Any]) -> list[str]:
    """The settings that are chosen for each run and are not among these."""
    needed = (part for part in FIELDS.values() if part.default is part.default_factory is dataclasses.MISSING)
    return [part.name for part in needed if part.name not in settings]


def is_unset(name: str, value: Any) -> bool:
    """Whether a setting's value says that there is no such thing."""
    return FIELDS[name].metadata.get("unset", False) and value == FIELDS[name].default


def default(name: str) -> Any:
    """A setting's value where nobody says; None if there is none, or if it is chosen for each run."""
    part = FIELDS[name]
    if part.default_factory is not dataclasses.MISSING:
        return part.default_factory()
    return None if part.default is dataclasses.MISSING or part.metadata else part.default


def opening(get: Callable[[str], Any]) -> dict[str, Any]:
    """What `open_data` is told of the images, by the settings that `get` gives, None or unset ones too."""
    said = {name: get(f"{name}_column") or "" for name in ("image", "label", "split", "group")}
    said |= {name: get(name) or "" for name in ("label_delimiter", "image_root")}
    columns = replace(Columns.of_words(said), by_setting=True)
    return {"val_fraction": get("val_fraction"), "seed": get("seed"), "columns": columns}


@functools.cache
def given_settings() -> Any:
    """A dataclass of all settings by name, for checking what was given of them."""
    parts = []
    for _, kind in _groups():
        hints = get_type_hints(kind, include_extras=True)
        for part in dataclasses.fields(kind):
            parts.append((part.name, hints[part.name], field(default=None, metadata=part.metadata)))
    return dataclasses.make_dataclass("Recipe", parts, frozen=True)
