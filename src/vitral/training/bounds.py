"""What bounds a run's speed, and the one setting to change; known from the clock, at no cost."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from vitral.runtime.devices import Device, compiles
from vitral.runtime.threads import cpu_count
from vitral.training.events import Evaluated, Event, RunBegins, StepDone
from vitral.training.run import Run

Part = Literal["decoding", "altering", "moving", "stepping"]

# Of the time of steps; while images are waited for less than this, the step bounds the run.
_WORTH_A_WORD = 0.2
_LEAST_SECONDS = 20.0  # of steps before anything is said
_WORDS: dict[Part, str] = {
    "decoding": "decoding of images",
    "altering": "augmentation",
    "moving": "moving of images to the device",
    "stepping": "the model itself",
}


@dataclass(frozen=True)
class Bound:
    """What a run waits for, for which share of the time of its steps, and what to do about it."""

    part: Part
    share: float
    advice: str

    def __str__(self) -> str:
        return f"{_WORDS[self.part]} bounds the speed ({self.share:.0%} of the time of steps): {self.advice}"


@dataclass(frozen=True)
class Means:
    """What a run loads and computes with."""

    workers: int
    cores: int
    decoding: str  # the setting
    rand_augment: float
    device: Device
    compile: bool | None  # None: nobody said

    @classmethod
    def of(cls, settings: Mapping[str, Any], cores: int) -> "Means":
        """Read them from a recipe's settings by name."""
        compile_ = settings.get("compile", "auto")
        return cls(
            int(settings.get("workers", 0)),
            cores,
            settings.get("decoding", "full"),
            float(settings.get("rand_augment", 0.0)),
            settings.get("device", "auto"),
            None if compile_ == "auto" else bool(compile_),
        )


def bound_of(seconds: Mapping[str, float], means: Means) -> Bound | None:
    """Judge by a clock's record; None where there is too little to judge by.

    Args:
        seconds: as `Clock.record` gives them.
        means: of the run.
    """
    waiting, stepping = seconds.get("waiting", 0.0), seconds.get("stepping", 0.0)
    total = waiting + stepping
    if total < _LEAST_SECONDS:
        return None
    moving = min(seconds.get("moving", 0.0), waiting)
    if waiting < _WORTH_A_WORD * total:
        return Bound("stepping", stepping / total, _for_steps(means))
    if moving > waiting / 2:
        return Bound("moving", moving / total, "take a smaller batch_size, or a smaller img_size")
    share = (waiting - moving) / total
    if seconds.get("decoding", 0.0) >= seconds.get("altering", 0.0):
        return Bound("decoding", share, _workers(means) or _for_decoding(means))
    return Bound("altering", share, _workers(means) or _for_altering(means))


def _workers(means: Means) -> str:
    """More processes, while there are cores for them."""
    most = means.cores if means.cores <= 2 else means.cores - 1
    return f"set workers={most}, which a resumed run may change" if means.workers < most else ""


def _for_decoding(means: Means) -> str:
    coarser = {"full": "fast", "fast": "fastest"}.get(means.decoding)
    if coarser:
        return f"set decoding={coarser} in a new run"
    return "store the images smaller, about twice as large as the model sees them"


def _for_altering(means: Means) -> str:
    if means.rand_augment:
        return "set rand_augment=0 in a new run, or store the images smaller"
    return "store the images smaller, about twice as large as the model sees them"


def _for_steps(means: Means) -> str:
    if means.device != "cpu" and not compiles(means.device, wanted=means.compile):
        return "set compile=true; else a smaller model or img_size"
    return "as it should be; a smaller model or img_size is faster"


class TellsBound:
    """A listener that says what bounds a run, and again if that becomes another part; of each part once."""

    def __init__(self) -> None:
        self._run: Run | None = None
        self._told: set[Part] = set()  # two that are as slow would take turns for ever

    def __call__(self, event: Event) -> None:
        """Judge after evaluations; on a CPU, where a step is waited for, after every step."""
        match event:
            case RunBegins(run=run):
                self._run = run
            case Evaluated():
                self._judge()
            case StepDone() if self._run is not None and self._run.placement.device.type == "cpu":
                if not self._told:
                    self._judge()

    def _judge(self) -> None:
        run = self._run
        if run is None:
            return
        found = bound_of(run.clock.seconds, Means.of(run.recipe.settings(), cpu_count()))
        if found is not None and found.part not in self._told:
            self._told.add(found.part)
            run.tell.message(str(found))
