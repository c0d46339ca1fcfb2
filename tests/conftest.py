"""What several test files share. Sizes are distinct primes where they can be, to catch swapped axes."""

import os
import signal
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from vitral.data.image_data import ImageData
from vitral.evaluation.evaluation import Evaluation
from vitral.recipes.recipe import Recipe
from vitral.recipes.resolve import load_base, resolve
from vitral.recipes.schema import FIELDS, Resolved
from vitral.training.events import Evaluated, Event, RunBegins, StepDone
from vitral.training.listeners import Message
from vitral.training.run import Run

SHARED = Path(__file__).parents[2] / "shared"


def write_images(
    folder: Path, classes: dict[str, int], size: tuple[int, int] = (24, 20), seed: int = 0
) -> Path:
    """An image folder of noise tinted by class: learnable, tiny and made here. `size` is (width, height)."""
    generator = np.random.default_rng(seed)
    for index, (name, count) in enumerate(classes.items()):
        (folder / name).mkdir(parents=True, exist_ok=True)
        tint = np.zeros(3)
        tint[index % 3] = 120
        for number in range(count):
            pixels = generator.integers(0, 120, (size[1], size[0], 3)) + tint
            Image.fromarray(pixels.astype(np.uint8)).save(folder / name / f"{number:03}.png")
    return folder


def settled(data: ImageData, recipe: Recipe, cpu_count: int = 1) -> Resolved:
    """What a run of a recipe works with."""
    return resolve(recipe, data, load_base(recipe), cpu_count)


def by_name(recipe: Resolved) -> SimpleNamespace:
    """Its settings by name; None for those that are unset."""
    return SimpleNamespace(**{**dict.fromkeys(FIELDS), **recipe.settings()})


class Reporter:
    """A listener with a method for each kind of event; they are given the run."""

    run: Run

    def __call__(self, event: Event) -> None:
        match event:
            case RunBegins():
                self.run = event.run
                self.begin(event.run)
            case Message():
                self.message(event.text)
            case StepDone():
                self.step(self.run)
            case Evaluated() if event.step:
                self.epoch(self.run, event.evaluation)

    def message(self, text: str) -> None: ...
    def begin(self, run: Run) -> None: ...
    def step(self, run: Run) -> None: ...
    def epoch(self, run: Run, evaluation: Evaluation) -> None: ...


class StopAt(Reporter):
    """Sends the process a signal after the given steps."""

    def __init__(self, *steps: int) -> None:
        self.steps = steps

    def step(self, run: Run) -> None:
        if run.state.step in self.steps:
            os.kill(os.getpid(), signal.SIGTERM)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No test reads or leaves features in the user's own cache."""
    monkeypatch.setenv("VITRAL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "features"


@pytest.fixture
def image_folder(tmp_path: Path) -> Path:
    """Three classes of twelve images each, unsplit."""
    return write_images(tmp_path / "images", {"ant": 12, "bee": 12, "cat": 12})


@pytest.fixture(scope="session")
def shared() -> Path:
    """The project's shared data; tests that need it skip where it is absent."""
    if not SHARED.is_dir():
        pytest.skip("../shared (real images and data sets) is not beside the project")
    return SHARED
