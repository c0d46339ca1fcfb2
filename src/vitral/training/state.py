"""What is remembered of a run: where it stands, what it is from its beginning on, and how it ended."""

import uuid
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from vitral.data.contents import Contents
from vitral.recipes.recipe import Recipe
from vitral.recipes.schema import FIELDS, Resolved
from vitral.runtime.devices import Placement
from vitral.runtime.errors import VitralError
from vitral.runtime.machine import describe_machine
from vitral.runtime.version import vitral_version

# Of a state that further steps need.
TENSORS = ("model", "average", "optimizer")


@dataclass
class RunState:
    """Where a run stands; with the tensors beside it, all that a resume needs."""

    step: int = 0
    seconds: float = 0.0  # spent so far, earlier sessions included
    best_score: float = -1.0  # of the task, as people are told it
    best_merit: float = -1.0  # what chose it
    best_loss: float = float("inf")  # decides between equal accuracies
    best_step: int = 0
    data: str = ""  # fingerprint of the training images' names
    start_seconds: float = 0.0  # of `seconds`, what the start took: no part of the schedule
    val_images: int = 0  # that each evaluation looks at, where time is the budget; 0: not known yet
    rate_share: float = 1.0  # of the schedule's learning rate, once the loss rose
    loss_watch: dict[str, Any] = field(default_factory=dict)  # `LossWatch.state_dict`
    recent: dict[str, Any] = field(default_factory=dict)  # `RunningMean.state_dict`, of all processes
    time: dict[str, float] = field(default_factory=dict)  # `Clock.seconds`

    def forget_best(self) -> None:
        fresh = RunState()
        self.best_score, self.best_merit = fresh.best_score, fresh.best_merit
        self.best_loss, self.best_step = fresh.best_loss, fresh.best_step


@dataclass(frozen=True)
class Summary:
    """How a run ended."""

    finished: bool  # False: stopped by a signal, and ready to resume
    steps: int
    epochs: float
    seconds: float
    best_step: int
    test: dict[str, Any] | None  # the evaluation of the test split, if there is one
    calibration: dict[str, Any] | None = None  # `Calibration`, on the validation images; None: too few
    val_top1: float | None = None  # None: multi-label
    val_mean_average_precision: float | None = None  # of multi-label data
    stopped_by: int | None = None  # the number of a signal that asked to stop
    time: dict[str, float] | None = None  # `Clock.record`; None: of older runs


@dataclass(frozen=True)
class Record:
    """What a run is, from its beginning on."""

    recipe: dict[str, Any]  # `Resolved.settings`
    threads: int  # of the CPU; another number adds in another order, and changes the bits
    contents: Contents
    damaged: tuple[str, ...] = ()  # names of images that could not be read
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    machine: dict[str, Any] = field(default_factory=dict)  # that it began on, and when; empty: older runs

    @classmethod
    def of(cls, recipe: Resolved, threads: int, contents: Contents) -> "Record":
        placement = Placement.choose(recipe.machine.device, recipe.machine.precision)
        machine = {**describe_machine(placement), "computes on": str(placement), "vitral": vitral_version()}
        return cls(recipe.settings(), threads, contents, machine={**machine, "torch": torch.__version__})

    def began(self) -> Resolved:
        """The recipe. Raises VitralError if it is one of another version of Vitral."""
        strange = self.recipe.keys() - FIELDS.keys()
        if strange:
            raise VitralError(f"this run was begun {elsewhere(strange)}")
        return Resolved.of(Recipe(**self.recipe).given)


@dataclass(frozen=True)
class Saved:
    """A checkpoint to resume from."""

    state: RunState
    tensors: dict[
        str, Any
    ]  # state dictionaries: "model", "average", "optimizer"; of a finished run the first
    description: str | None  # of the model (`checkpoints.description`); None: of older runs
    run: str | None  # the `Record`'s id; None: of older runs
    folder: Path | None = None  # where the tensors are that the processes of a large run wrote piece by piece

    @property
    def can_go_on(self) -> bool:
        """Whether all is there that further steps need."""
        return self.folder is not None or set(TENSORS) <= set(self.tensors)


def elsewhere(unknown: Iterable[str]) -> str:
    return f"by another version of Vitral, with {min(unknown)}; resume it with that version"
