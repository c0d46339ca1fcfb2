"""A run is one thing on disk: killed, damaged or changed anywhere, it goes on, or one line says what is lost."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import tomllib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.conftest import write_images
from tests.test_resume import Crash, CrashAt, StopAt, tensors
from vitral.checkpoints import Checkpoint, load_checkpoint, save_checkpoint
from vitral.contents import Contents
from vitral.data import ImageData, Split, open_data
from vitral.errors import VitralError
from vitral.model import VisionTransformer
from vitral.preprocess import Preprocess
from vitral.recipe import Recipe
from vitral.run_folder import RunFolder
from vitral.train import Reporter, Run, train

# Two steps an epoch, with a checkpoint and an evaluation after each epoch.
STEPS = 4


class Listener(Reporter):
    def __init__(self) -> None:
        self.messages: list[str] = []

    def message(self, text: str) -> None:
        self.messages.append(text)


def split(name: str, count: int) -> Split:
    generator = np.random.default_rng(len(name))
    images = [
        Image.fromarray(generator.integers(0, 255, (8, 8, 3), dtype=np.uint8)) for _ in range(count)
    ]
    return Split(images, np.arange(count) % 2, [f"{name} {number}" for number in range(count)])


@pytest.fixture
def data() -> ImageData:
    """A few images in memory."""
    splits = {name: split(name, count) for name, count in (("train", 9), ("val", 10), ("test", 5))}
    return ImageData("memory", ("a", "b"), splits)


@pytest.fixture
def recipe() -> Recipe:
    """A run of a fifth of a second."""
    return Recipe(
        model="ViT-Pico/4@8",
        architecture={"embed_dim": 8, "num_layers": 1, "num_heads": 1},
        optimizer="adamw",
        whiten=False,
        steps=STEPS,
        batch_size=4,
        workers=0,
        device="cpu",
        precision="float32",
    )


def files_of(folder: Path) -> dict[str, bytes]:
    return {
        str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()
    }


def state(folder: Path) -> dict[str, Any]:
    return torch.load(folder / "checkpoints/state.pt", weights_only=True)


def summary(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "summary.json").read_text()) | {"seconds": 0}


def evaluated(folder: Path) -> list[tuple]:
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(record["step"], record["val_loss"], record["val_top1"]) for record in records]


def assert_same_end(one: Path, other: Path) -> None:
    for file in ("model.safetensors", "config.json", "last/model.safetensors", "recipe.toml"):
        texts = [(run / file).read_bytes().replace(str(run).encode(), b"") for run in (one, other)]
        assert texts[0] == texts[1], file
    assert summary(one) == summary(other)
    assert evaluated(one) == evaluated(other)
    assert {name for name in files_of(one)} == {name for name in files_of(other)}


# --- Killed at every write -----------------------------------------------------------------------


class Death(BaseException):
    pass


@contextmanager
def death_at(moment: int) -> Iterator[list[str]]:
    """Dies at the given moment; the files of a dead process stay as they are, whatever its code would clear.

    The moments are before and after each file comes to its name or goes. Gives the list of those passed.
    """
    moments: list[str] = []

    def fatal(act: Callable[..., Any]) -> Callable[..., Any]:
        def acted(*words: Any, **options: Any) -> Any:
            for when in ("before", "after"):
                if len(moments) >= moment:
                    raise Death
                moments.append(f"{when} {act.__name__} {words or options}")
                if when == "before":
                    result = act(*words, **options)
            return result

        return acted

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(os, "replace", fatal(os.replace))
        patched.setattr(tempfile, "mkstemp", fatal(tempfile.mkstemp))
        for name in ("unlink", "mkdir", "rmdir"):
            patched.setattr(Path, name, fatal(getattr(Path, name)))
        yield moments


def carried_on(data: ImageData, folder: Path, recipe: Recipe) -> None:
    if RunFolder(folder).holds_run:
        train(data, folder, Recipe(), resume=True)
    else:
        train(data, folder, recipe)


def assert_dies_well(data: ImageData, recipe: Recipe, folder: Path, straight: Path, moment: int) -> None:
    with pytest.raises(Death), death_at(moment):
        train(data, folder, recipe)
    if RunFolder(folder).finished:
        with pytest.raises(VitralError, match="is finished"):
            train(data, folder, Recipe(), resume=True)
        return
    carried_on(data, folder, recipe)
    assert_same_end(straight, folder)
    shutil.rmtree(folder)


@pytest.mark.parametrize("every", [pytest.param(1, marks=pytest.mark.slow), 7])
def test_killed_at_any_write_a_run_ends_the_same(
    every: int, data: ImageData, recipe: Recipe, tmp_path: Path
) -> None:
    with death_at(10**6) as moments:
        train(data, tmp_path / "straight", recipe)
    assert len(moments) > 60
    for moment in range(0, len(moments), every):
        assert_dies_well(data, recipe, tmp_path / f"{moment}", tmp_path / "straight", moment)


def test_killed_while_it_concludes_a_run_ends_the_same(
    data: ImageData, recipe: Recipe, tmp_path: Path
) -> None:
    kept = replace(recipe, keep_state=True)
    with death_at(10**6) as moments:
        train(data, tmp_path / "straight", kept)
    # From the last of `last/` on: the temperature, the summary, the lock.
    for moment in range(len(moments) - 14, len(moments)):
        assert_dies_well(data, kept, tmp_path / f"{moment}", tmp_path / "straight", moment)


def test_killed_while_it_is_taken_up_a_run_ends_the_same(
    data: ImageData, recipe: Recipe, tmp_path: Path
) -> None:
    train(data, tmp_path / "straight", recipe)
    stopped = tmp_path / "stopped"
    train(data, stopped, recipe, reporter=StopAt(3))
    with (stopped / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "val_l')  # killed in the middle of a line
    moment = 0
    while True:
        folder = shutil.copytree(stopped, tmp_path / f"{moment}")
        with death_at(moment) as moments:
            try:
                train(data, folder, Recipe(), resume=True, reporter=CrashAt(4))
            except Crash:
                break
            except Death:
                pass
        carried_on(data, folder, recipe)
        assert_same_end(tmp_path / "straight", folder)
        moment += 1
    assert len(moments) > 15
