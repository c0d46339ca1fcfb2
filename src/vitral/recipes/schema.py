"""Every setting of a run: its name, type, range and default, in small groups.

`Resolved` is what a run works with: each setting has a value. What `vitral.recipes.resolve` chooses for each
run, unless the user says it, has no default here, or one that files of older runs without it are read with.
"""

import dataclasses
import functools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_type_hints

from pydantic import Field

from vitral.images.augmentation import Augmentation, Crop
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
)

# Packaged recipes: TOML files of settings.
RECIPES = Path(__file__).parent

OptimizerName = Literal["adamw", "muon", "lion", "sgd", "schedule_free"]
Schedule = Literal["cosine", "linear", "wsd", "constant"]
Loss = Literal["cross_entropy", "binary"]  # "binary": each class for itself, for several labels an image
Trained = Literal["all", "head", "lora"]


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
    pooling: Pooling | Literal[""] = field(default="", metadata=_UNSET)  # "": as the model has it
    dropout: Share = 0.0
    drop_path: Share = 0.0  # stochastic depth of the last layer
    # Other fields of `ViTConfig`.
    architecture: dict[str, Any] = field(default_factory=dict, metadata={"fields_of": ViTConfig})
    # Begin a new stem with filters that whiten the data's pixels.
    whiten: bool = field(default=False, metadata=_CHOSEN)


@dataclass(frozen=True)
class Tuning:
    """What learns of a trained model."""

    candidates: tuple[str, ...] = ("hf://facebook/dinov2-small",)  # checkpoints that model="auto" tries
    # Whether a trained model's new head begins as its linear probe, where each image shows one class.
    probe_head: bool = field(default=False, metadata=_CHOSEN)
    # Everything, a new "head" alone, or "lora" and the head. Where nobody says: everything, or what trials
    # find better where the budget is in minutes.
    trained: Trained = field(default="all", metadata=_CHOSEN)
    lora_rank: Annotated[int, Field(ge=1, le=4096)] = 16  # of "lora" (arXiv:2106.09685)


@dataclass(frozen=True)
class Limits:
    """The budget: the first limit that is reached ends the run, and the schedule is laid out for it."""

    epochs: Budget = field(default=_NO_LIMIT, metadata=_UNSET)
    steps: Count = field(default=_NO_LIMIT, metadata=_UNSET)
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

    optimizer: OptimizerName
    weight_decay: Annotated[float, Field(ge=0, le=100)]  # of weight matrices alone, see `parameter_groups`
    layer_decay: Part  # learning rate from layer to layer down
    ema_decay: Share  # of the averaged weights: those that are evaluated and kept
    betas: tuple[Share, Share] = (0.9, 0.999)  # of Adam and Lion; SGD's momentum is the first
    muon_momentum: Share = 0.95
    clip_norm: Strength = 1.0  # largest norm of all gradients together; 0: no limit


@dataclass(frozen=True)
class Rate:
    """The learning rate and its course."""

    learning_rate: Positive  # at its peak
    schedule: Schedule
    warmup: Share  # share of the budget over which the learning rate rises from 0
    # Batch that it is meant for, and scaled linearly to others; 0: for any.
    learning_rate_batch: Batch = field(default=0, metadata=_UNSET)
    decay: Share = 0.2  # share of the budget over which the schedule "wsd" falls at the end
    final_share: Whole = 0.0  # of the peak rate, at the end


@dataclass(frozen=True)
class Batches:
    """How many images a step takes, and in which way."""

    batch_size: Batch
    # Share of the budget, from its start, over which images grow from half to the whole of the size, as in
    # progressive learning (EfficientNetV2, arXiv:2104.00298, §4).
    small_images: Share
    accumulate: Batch = 1  # parts that a batch is computed in, one after the other, to fit the memory
    checkpoint_layers: bool = False  # computes activations twice rather than keep them (arXiv:1604.06174)


@dataclass(frozen=True)
class Criterion:
    """What is minimized."""

    loss: Loss
    label_smoothing: Share  # of the targets, spread over all classes
    class_weights: Literal["none", "balanced"] = "none"  # "balanced": rare classes weigh more in the loss
    teacher: str = field(default="", metadata=_UNSET)  # a checkpoint with the same labels, to distil from
    distillation: Literal["hard", "soft"] = "hard"  # its labels or its probabilities (DeiT, arXiv:2012.12877)
    distillation_share: Whole = 0.5  # of the loss that is the teacher's
    distillation_temperature: Annotated[float, Field(ge=0.01, le=1000)] = 3.0  # of "soft"


@dataclass(frozen=True)
class Alteration:
    """How training images are altered, each by itself; see `Augmentation`."""

    crop: Crop
    flip: bool
    rand_augment: Annotated[float, Field(ge=0, le=30)]  # magnitude, 30 for level 10; 0 is off
    crop_scale: Part = 0.35  # smallest part of the area for "resized"
    # Centre kept in evaluation; 0: in fine-tuning the checkpoint's, else 0.9 for "resized" and 1.
    crop_fraction: Part = field(default=0.0, metadata=_UNSET)
    three_augment: bool = False  # DeiT-III's: grey, solarized or blurred
    # Largest change of brightness, contrast and saturation; 0 is off.
    color_jitter: Annotated[float, Field(ge=0, le=10)] = 0.0
    rand_augment_ops: Annotated[int, Field(ge=1, le=20)] = 2
    rand_augment_share: Part = 1.0  # probability of each operation
    erasing: Share = 0.0  # probability of a rectangle of noise

    @property
    def augmentation(self) -> Augmentation:
        return Augmentation(
            **{part.name: getattr(self, part.name) for part in dataclasses.fields(Augmentation)}
        )


@dataclass(frozen=True)
class Mixing:
    """How images of a batch are mixed."""

    cutmix: Strength  # alpha; 0 is off. With both on, each batch takes one by chance
    mixup: Strength = 0.0  # alpha; 0 is off
    # Passes over the images after which every batch is mixed; until then the probability grows evenly.
    mix_passes: NotNegative = field(default=0.0, metadata=_CHOSEN)


@dataclass(frozen=True)
class Images:
    """Which images are trained on, and in which order."""

    sampling: Literal["shuffled", "balanced"] = "shuffled"  # "balanced": each class is drawn as often
    # Times that an image is taken in a row, each time altered anew.
    repeats: Annotated[int, Field(ge=1, le=1000)] = 1
    val_fraction: Share = 0.2  # to validate on, where the data has no validation split
    max_damaged: Share = 0.01  # share of unreadable images past which the run stops


@dataclass(frozen=True)
class Course:
    """The course of a run."""

    seed: Seed = 0
    eval_epochs: Count = 1  # passes between evaluations; on a GPU one may take less than a second
    # Between checkpoints to resume from; 0: an epoch.
    checkpoint_steps: Count = field(default=0, metadata=_UNSET)
    keep_state: bool = False  # of the optimizer, once the run is finished, to go on with a larger budget


@dataclass(frozen=True)
class Machine:
    """What computes."""

    workers: Workers = field(default=0, metadata=_CHOSEN)  # processes that load images
    # Of the CPU; 0: as many as torch takes, and on resume as the run had.
    threads: Threads = field(default=0, metadata=_UNSET)
    device: Device = "auto"
    precision: Precision = "auto"
    compile: bool | Literal["auto"] = "auto"  # torch.compile; "auto": where it is faster

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


@functools.cache
def given_settings() -> Any:
    """A dataclass of all settings by name, for checking what was given of them."""
    parts = []
    for _, kind in _groups():
        hints = get_type_hints(kind, include_extras=True)
        for part in dataclasses.fields(kind):
            parts.append((part.name, hints[part.name], field(default=None, metadata=part.metadata)))
    return dataclasses.make_dataclass("Recipe", parts, frozen=True)
