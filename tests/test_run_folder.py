"""A run is one thing on disk: killed, damaged or changed, it goes on, or a line says what is lost."""

import errno
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.conftest import Reporter, settled, write_images
from tests.test_resume import Crash, CrashAt, StopAt
from vitral.checkpoints.folder import Checkpoint, load_checkpoint, save_checkpoint
from vitral.data.contents import Contents
from vitral.data.image_data import ImageData, open_data
from vitral.data.split import Split
from vitral.images.preprocess import Preprocess
from vitral.model.vit import VisionTransformer
from vitral.recipes.packaged import read
from vitral.recipes.recipe import Recipe
from vitral.recipes.schema import Resolved, missing
from vitral.runtime.errors import VitralError
from vitral.training.changes import changed
from vitral.training.loop import train
from vitral.training.run import Run
from vitral.training.run_folder import RunFolder

# Two steps an epoch, with a checkpoint and an evaluation after each epoch.
STEPS = 4
NO_CHANGE = Recipe()


class Listener(Reporter):
    def __init__(self) -> None:
        self.messages: list[str] = []

    def message(self, text: str) -> None:
        self.messages.append(text)


def split(name: str, count: int) -> Split:
    generator = np.random.default_rng(len(name))
    images = [Image.fromarray(generator.integers(0, 255, (8, 8, 3), dtype=np.uint8)) for _ in range(count)]
    return Split(images, np.arange(count) % 2, [f"{name} {number}" for number in range(count)])


@pytest.fixture(scope="module")
def data() -> ImageData:
    """A few images in memory."""
    splits = {name: split(name, count) for name, count in (("train", 9), ("val", 10), ("test", 5))}
    return ImageData("memory", ("a", "b"), splits)


@pytest.fixture(scope="module")
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


@pytest.fixture(scope="module")
def straight(data: ImageData, recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was never stopped; not to be changed."""
    folder = tmp_path_factory.mktemp("runs") / "straight"
    train(data, folder, recipe)
    return folder


@pytest.fixture(scope="module")
def _stopped(data: ImageData, recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "stopped"
    train(data, folder, recipe, listeners=[StopAt(3)])
    return folder


@pytest.fixture
def stopped(_stopped: Path, tmp_path: Path) -> Path:
    """The same run, stopped after three of its four steps."""
    return shutil.copytree(_stopped, tmp_path / "stopped")


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def state(folder: Path) -> dict[str, Any]:
    return torch.load(folder / "checkpoints/state.pt", weights_only=True)


def summary(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "summary.json").read_text()) | {"seconds": 0, "time": {}}


def evaluated(folder: Path) -> list[tuple]:
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(record["step"], record["val_loss"], record["val_top1"]) for record in records]


def assert_same_end(one: Path, other: Path) -> None:
    for file in ("model.safetensors", "config.json", "last/model.safetensors", "recipe.toml"):
        texts = [(run / file).read_bytes().replace(str(run).encode(), b"") for run in (one, other)]
        assert texts[0] == texts[1], file
    assert summary(one) == summary(other)
    assert evaluated(one) == evaluated(other)
    assert files_of(one).keys() == files_of(other).keys()


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
        def pass_moment(when: str, words: object) -> None:
            if len(moments) >= moment:
                raise Death
            moments.append(f"{when} {act.__name__} {words}")

        def acted(*words: Any, **options: Any) -> Any:
            pass_moment("before", words or options)
            result = act(*words, **options)
            pass_moment("after", words or options)
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
    kept = recipe.changed(keep_state=True)
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
    train(data, stopped, recipe, listeners=[StopAt(3)])
    with (stopped / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "val_l')  # killed in the middle of a line
    for moment in range(0, 100, 3):
        folder = shutil.copytree(stopped, tmp_path / f"{moment}")
        with death_at(moment) as moments:
            try:
                train(data, folder, Recipe(), resume=True, listeners=[CrashAt(4)])
            except Crash:
                break
            except Death:
                pass
        carried_on(data, folder, recipe)
        assert_same_end(tmp_path / "straight", folder)
    assert len(moments) > 15


# --- Damaged -------------------------------------------------------------------------------------


def resume(data: ImageData, folder: Path, recipe: Recipe = NO_CHANGE) -> list[str]:
    """What was said."""
    listener = Listener()
    train(data, folder, recipe, resume=True, listeners=[listener])
    return listener.messages


def refused(data: ImageData, folder: Path, recipe: Recipe = NO_CHANGE) -> str:
    """The line; the folder is as it was."""
    before = files_of(folder)
    with pytest.raises(VitralError) as caught:
        train(data, folder, recipe, resume=True)
    assert files_of(folder) == before
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("damage", ["gone", "weights", "config", "stale", "half a line", "leftovers"])
def test_what_can_be_made_again_is(damage: str, data: ImageData, stopped: Path, straight: Path) -> None:
    last = stopped / "last"
    if damage == "gone":
        shutil.rmtree(last)
    elif damage == "weights":
        (last / "model.safetensors").write_bytes(b"damage")
    elif damage == "config":
        (last / "config.json").write_text("{")
    elif damage == "stale":
        shutil.copy(stopped / "model.safetensors", last)
    elif damage == "half a line":
        file = stopped / "metrics.jsonl"
        file.write_bytes(file.read_bytes() + b'{"step": 3, "val_\xff')
    else:
        for name in (
            ".config.json.abcd_123",
            "last/.model.safetensors.00000000",
            "checkpoints/.state.pt.zzzzzzzz",
        ):
            (stopped / name).write_bytes(b"half")
    resume(data, stopped)
    assert_same_end(straight, stopped)


def test_files_that_are_no_leftovers_stay(data: ImageData, stopped: Path) -> None:
    for name in (".env", ".notes.txt.12345678", "model.safetensors.backup00"):
        (stopped / name).write_text("mine")
    resume(data, stopped)
    assert (stopped / ".notes.txt.12345678").read_text() == (stopped / ".env").read_text() == "mine"


def test_a_lost_state_is_told_and_nothing_else_is_lost(data: ImageData, stopped: Path) -> None:
    (stopped / "checkpoints/state.pt").unlink()
    line = refused(data, stopped)
    assert line.startswith(f"{stopped}/checkpoints/state.pt is gone, without which the run cannot go on; ")
    assert line.endswith(f"begin a new run with another --out from its last weights, model={stopped}/last")


def test_a_lost_state_is_told_though_all_checkpoints_are_lost(
    data: ImageData, recipe: Recipe, tmp_path: Path
) -> None:
    train(data, tmp_path / "run", recipe.changed(steps=6), listeners=[StopAt(5)])
    shutil.rmtree(tmp_path / "run/checkpoints")
    shutil.rmtree(tmp_path / "run/last")
    line = refused(data, tmp_path / "run")
    assert line.endswith(f"from its best weights, model={tmp_path / 'run'}")


@pytest.mark.parametrize("where", [0.2, 0.5, 0.8])
def test_a_flipped_bit_in_the_state_is_seen(where: float, data: ImageData, stopped: Path) -> None:
    file = stopped / "checkpoints/state.pt"
    content = bytearray(file.read_bytes())
    largest = max(state(stopped)["model"].values(), key=lambda tensor: tensor.numel())
    at = content.find(largest.numpy().tobytes())
    content[at + int(where * largest.nbytes)] ^= 1
    file.write_bytes(content)
    assert "state.pt is damaged and cannot be resumed; begin a new run" in refused(data, stopped)


def test_the_state_of_another_run_is_refused(
    data: ImageData, recipe: Recipe, stopped: Path, tmp_path: Path
) -> None:
    train(data, tmp_path / "other", recipe, listeners=[StopAt(2)])
    shutil.copy(tmp_path / "other/checkpoints/state.pt", stopped / "checkpoints")
    assert f"state.pt is another run's; put back the one that belongs to {stopped}" in refused(data, stopped)


def edit(folder: Path, old: str, new: str) -> None:
    file = folder / "recipe.toml"
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new))


def test_a_recipe_changed_by_hand_is_refused(data: ImageData, stopped: Path) -> None:
    edit(stopped, "batch_size = 4", "batch_size = 3")
    assert "recipe.toml has batch_size=3, and the run began with batch_size=4; put that back" in refused(
        data, stopped
    )


def test_a_budget_changed_by_hand_holds(data: ImageData, stopped: Path) -> None:
    edit(stopped, "steps = 4", "epochs = 3")
    assert resume(data, stopped) == []
    assert summary(stopped)["steps"] == 6


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("batch_size = 4\n", "", "has no batch_size any more; the run goes on as it began"),
        ("steps = 4\n", "", "has no steps any more"),
        ("batch_size = 4", "batch_size = ", "is not TOML"),
        ("batch_size = 4", "batch_size = 'four'", "cannot be used (batch_size='four'"),
        ("batch_size = 4", "batchsize = 4\nbatch_size = 4", "there is no setting 'batchsize'"),
        (None, None, "there is no file"),
    ],
)
def test_what_a_recipe_lacks_the_record_knows(
    old: str | None, new: str | None, said: str, data: ImageData, stopped: Path, straight: Path
) -> None:
    if old is None or new is None:
        (stopped / "recipe.toml").unlink()
    else:
        edit(stopped, old, new)
    (line,) = resume(data, stopped)
    assert said in line
    assert_same_end(straight, stopped)


def test_without_a_record_a_recipe_must_be_whole(data: ImageData, stopped: Path) -> None:
    (stopped / "checkpoints/run.json").unlink()
    edit(stopped, "batch_size = 4\n", "")
    assert "recipe.toml has no batch_size; put back what stood there" in refused(data, stopped)


def test_a_new_recipe_has_all_that_a_recipe_must_have(data: ImageData, recipe: Recipe) -> None:
    settings = settled(data, recipe).settings()
    assert not missing(settings)


@pytest.mark.parametrize("content", [b"", b"{", b'{"id": 3}'])
def test_a_damaged_record_is_told(content: bytes, data: ImageData, stopped: Path, straight: Path) -> None:
    (stopped / "checkpoints/run.json").write_bytes(content)
    (line,) = resume(data, stopped)
    assert line.endswith("run.json is damaged: whether settings and data changed is not checked")
    assert_same_end(straight, stopped)


@pytest.mark.parametrize("content", [None, b"", b'{"finished": tr', b'{"finished": false}', b"[]"])
def test_a_run_without_a_whole_summary_concludes(
    content: bytes | None, data: ImageData, straight: Path, tmp_path: Path
) -> None:
    ended = shutil.copytree(straight, tmp_path / "ended")
    if content is None:
        (ended / "summary.json").unlink()
    else:
        (ended / "summary.json").write_bytes(content)
    resume(data, ended)
    assert_same_end(straight, ended)


def test_best_weights_that_are_gone_are_told(data: ImageData, stopped: Path) -> None:
    (stopped / "model.safetensors").unlink()
    (line,) = resume(data, stopped)
    assert line == (
        f"the best weights in {stopped}, of step 2, are gone or damaged; the best weights from now on "
        "replace them"
    )
    assert summary(stopped)["best_step"] == 4
    load_checkpoint(stopped)


class FillDiskAt(Reporter):
    """Lets nothing more be written from a step on."""

    def __init__(self, step: int, patched: pytest.MonkeyPatch) -> None:
        self.at, self.patched = step, patched

    def step(self, run: Run) -> None:
        if run.state.step == self.at:
            self.patched.setattr(os, "fsync", self.full)

    def full(self, _: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("step", [0, 2, 4])
def test_a_full_disk_loses_nothing(
    step: int, data: ImageData, recipe: Recipe, straight: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    with pytest.MonkeyPatch.context() as patched:
        filling = FillDiskAt(step, patched)
        if not step:
            patched.setattr(os, "fsync", filling.full)
        with pytest.raises(VitralError, match="run: No space left on device; make room, and go on with"):
            train(data, folder, recipe, listeners=[filling])
    assert folder.exists() == bool(step)
    assert not any(".tmp" in name or name.startswith(".") for name in files_of(tmp_path))
    carried_on(data, folder, recipe)
    assert_same_end(straight, folder)


# --- Finished ------------------------------------------------------------------------------------


def test_a_finished_run_keeps_no_state_of_the_optimizer(
    data: ImageData, straight: Path, tmp_path: Path
) -> None:
    assert set(state(straight)) == {"run", "description", "state", "model"}
    ended = shutil.copytree(straight, tmp_path / "ended")
    line = refused(data, ended, Recipe(steps=8))
    assert line == (
        f"{ended} is finished, and the optimizer's state was dropped then (keep_state=true keeps it for a "
        f"larger budget); to train on from its weights, begin a new run with model={ended}"
    )
    assert refused(data, ended) == line
    shutil.rmtree(ended / "checkpoints")
    assert refused(data, ended) == line


def test_with_keep_state_a_larger_budget_goes_on(data: ImageData, recipe: Recipe, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    train(data, folder, recipe.changed(keep_state=True))
    assert "is finished; name a larger budget to go on" in refused(data, folder)
    train(data, folder, Recipe(steps=8), resume=True, listeners=[StopAt(6)])
    assert not RunFolder(folder).finished
    resume(data, folder)
    assert summary(folder)["steps"] == 8


class StopInTheTest(Reporter):
    """Asks to stop when the last epoch is judged, so that the stop falls into what follows."""

    def epoch(self, run: Run, evaluation: Any) -> None:
        if run.budget.is_spent:
            os.kill(os.getpid(), 15)


def test_a_stop_while_it_concludes_is_taken_up(
    data: ImageData, recipe: Recipe, straight: Path, tmp_path: Path
) -> None:
    ended = train(data, tmp_path / "run", recipe, listeners=[StopInTheTest()])
    assert not ended.finished
    assert not (tmp_path / "run/summary.json").exists()
    resume(data, tmp_path / "run")
    assert_same_end(straight, tmp_path / "run")


# --- Refused -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        {"teacher": "missing/teacher"},
        {"batch_size": 10},
        {"model": "ViT-Pico/3@8"},
        {"architecture": {"embed_dim": 7, "num_heads": 3}},
        {"trained": "lora"},
    ],
    ids=str,
)
def test_a_refused_run_leaves_nothing(
    settings: dict[str, Any], data: ImageData, recipe: Recipe, tmp_path: Path
) -> None:
    (tmp_path / "there").mkdir()
    for folder in (tmp_path / "new/run", tmp_path / "there"):
        with pytest.raises(VitralError):
            train(data, folder, recipe.changed(**settings))
    assert not (tmp_path / "new").exists()
    assert not list((tmp_path / "there").iterdir())


def test_an_extra_that_is_missing_leaves_nothing(
    data: ImageData, recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lion = recipe.changed(optimizer="lion")
    with monkeypatch.context() as patched:
        patched.setitem(sys.modules, "lion_pytorch", None)
        with pytest.raises(VitralError, match="optimizer=lion needs lion_pytorch"):
            train(data, tmp_path / "run", lion)
    assert not (tmp_path / "run").exists()
    assert train(data, tmp_path / "run", lion).finished


class CrashBefore(Reporter):
    def begin(self, run: Run) -> None:
        raise Crash


def test_a_run_that_fails_before_its_first_step_leaves_nothing(
    data: ImageData, recipe: Recipe, tmp_path: Path
) -> None:
    with pytest.raises(Crash):
        train(data, tmp_path / "run", recipe, listeners=[CrashBefore()])
    assert not (tmp_path / "run").exists()


def test_a_budget_that_is_spent_is_refused_and_forgotten(
    data: ImageData, stopped: Path, straight: Path
) -> None:
    assert "is already at step 3, past steps=2; name a larger budget, or none" in refused(
        data, stopped, Recipe(steps=2)
    )
    resume(data, stopped)
    assert_same_end(straight, stopped)


# --- Where a run may lie -------------------------------------------------------------------------


def out_refused(data: ImageData, folder: Path, recipe: Recipe) -> str:
    with pytest.raises(VitralError) as caught:
        train(data, folder, recipe)
    return str(caught.value)


def test_a_folder_that_holds_a_model_is_refused(data: ImageData, recipe: Recipe, tmp_path: Path) -> None:
    model = VisionTransformer(8, 4, embed_dim=8, num_layers=1, num_heads=1, num_classes=2)
    base = tmp_path / "run/last"
    save_checkpoint(base, Checkpoint(model, Preprocess((8, 8)), ("a", "b")))
    before = files_of(tmp_path)
    assert "last holds a model, which a run would overwrite" in out_refused(data, base, recipe)
    assert "last holds a model, which a run would overwrite" in out_refused(data, tmp_path / "run", recipe)
    for name in ("model", "teacher"):
        named: dict[str, Any] = {name: str(base)}
        line = out_refused(data, tmp_path, recipe.changed(**named))
        assert f"--out {tmp_path} holds {name}={base}, which the run would overwrite" in line
    assert files_of(tmp_path) == before


def test_what_another_run_left_is_not_taken_for_the_run_s(
    data: ImageData, recipe: Recipe, straight: Path, tmp_path: Path
) -> None:
    for name in ("summary.json", "metrics.jsonl"):
        (tmp_path / "run").mkdir(exist_ok=True)
        shutil.copy(straight / name, tmp_path / "run")
    train(data, tmp_path / "run", recipe, listeners=[StopAt(1)])
    assert not RunFolder(tmp_path / "run").finished
    resume(data, tmp_path / "run")
    assert_same_end(straight, tmp_path / "run")


@pytest.mark.parametrize("place", ["images", "images/run", "images/ant", "."])
def test_a_run_within_its_images_or_around_them_is_refused(
    place: str, recipe: Recipe, image_folder: Path
) -> None:
    folder = image_folder.parent / place
    before = files_of(image_folder.parent)
    assert "lie one within the other; choose an --out beside them" in out_refused(
        open_data(str(image_folder)), folder, recipe
    )
    assert files_of(image_folder.parent) == before
    assert not (image_folder / "run").exists()


@pytest.mark.parametrize(
    ("place", "reason"),
    [
        ("photo.jpg", "photo.jpg is a file; a run needs a folder of its own"),
        ("photo.jpg/run", "photo.jpg is a file; a run needs a folder of its own"),
        ("/proc/run", "a run cannot be written there: "),
        ("x" * 300, "a run cannot be written there: File name too long"),
    ],
)
def test_where_no_run_can_be_written_is_said(
    place: str, reason: str, data: ImageData, recipe: Recipe, tmp_path: Path
) -> None:
    (tmp_path / "photo.jpg").write_bytes(b"picture")
    assert reason in out_refused(data, tmp_path / place, recipe)


def test_no_permission_is_said(data: ImageData, recipe: Recipe, tmp_path: Path) -> None:
    (tmp_path / "closed").mkdir(mode=0o500)
    if os.access(tmp_path / "closed", os.W_OK):
        pytest.skip("this user may write anywhere")
    assert "a run cannot be written there: Permission denied" in out_refused(
        data, tmp_path / "closed/run", recipe
    )


# --- One at a time -------------------------------------------------------------------------------


class Blocker(Reporter):
    """Holds a run at its first step until it is let go."""

    def __init__(self) -> None:
        self.there, self.let_go = threading.Event(), threading.Event()

    def step(self, run: Run) -> None:
        self.there.set()
        assert self.let_go.wait(60)


@pytest.mark.parametrize("again", [False, True])
def test_two_runs_in_one_folder_are_refused(
    again: bool, data: ImageData, recipe: Recipe, tmp_path: Path
) -> None:
    blocker = Blocker()
    first = threading.Thread(
        target=train, args=(data, tmp_path / "run", recipe), kwargs={"listeners": [blocker]}
    )
    first.start()
    assert blocker.there.wait(60)
    try:
        with pytest.raises(VitralError) as caught:
            train(data, tmp_path / "run", recipe, resume=again)
    finally:
        blocker.let_go.set()
        first.join()
    assert str(caught.value) == (
        f"{tmp_path / 'run'} is in use: process {os.getpid()} trains there; wait for it, stop it, or choose "
        "another --out"
    )
    assert RunFolder(tmp_path / "run").finished


_HOLDER = """
import os, sys, time
from pathlib import Path
from vitral.runtime.lock import LockedError, locked
try:
    with locked(Path(sys.argv[1])):
        if os.fork() == 0:  # a worker, which lives on for a while
            os.closerange(0, 3)
            time.sleep(20)
            os._exit(0)
        print("held", flush=True)
        time.sleep(60)
except LockedError as error:
    print("refused", error.pid, flush=True)
"""


def test_a_lock_is_one_process_s_and_goes_with_it(tmp_path: Path) -> None:
    start = lambda: subprocess.Popen(  # noqa: E731
        [sys.executable, "-c", _HOLDER, str(tmp_path / ".lock")], stdout=subprocess.PIPE, text=True
    )
    both = [start(), start()]
    lines = [process.stdout.readline().split() for process in both if process.stdout]
    holder = both[lines.index(["held"])]
    assert ["refused", str(holder.pid)] in lines
    with (
        pytest.raises(VitralError, match=f"process {holder.pid} trains there"),
        RunFolder(tmp_path).claimed(),
    ):
        pass
    holder.kill()
    holder.wait()
    with RunFolder(tmp_path).claimed():
        assert (tmp_path / ".lock").read_text() == f"{os.getpid()}\n"
    assert not list(tmp_path.iterdir())
    for process in both:
        process.communicate()


# --- What a run learns from ----------------------------------------------------------------------


def rewrite(image: Path) -> None:
    """Other pixels in a file of the same size and name."""
    with Image.open(image) as opened:
        shape = (opened.height, opened.width, 3)
    pixels = np.random.default_rng(0).integers(0, 255, shape, dtype=np.uint8)
    Image.fromarray(pixels).save(image)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Pictures without compression, so that other pixels make a file of the same length."""
    folder = write_images(tmp_path / "photos", {"ant": 10, "bee": 10})
    for file in list(folder.rglob("*.png")):
        with Image.open(file) as opened:
            opened.save(file.with_suffix(".bmp"))
        file.unlink()
    return folder


@pytest.fixture
def begun(photos: Path, recipe: Recipe, tmp_path: Path) -> Path:
    """A run on them, stopped after the first epoch of four steps."""
    train(open_data(str(photos)), tmp_path / "begun", recipe.changed(steps=8), listeners=[StopAt(5)])
    return tmp_path / "begun"


@pytest.mark.parametrize(("split", "what"), [("train", "training"), ("val", "validation")])
def test_other_pixels_are_seen(split: str, what: str, photos: Path, begun: Path) -> None:
    name = open_data(str(photos)).split(split).names[1]
    rewrite(photos / name)
    line = refused(open_data(str(photos)), begun)
    assert (
        f"the content of 1 {what} images in {photos} changed since {begun} began, for example {name}" in line
    )


def test_files_copied_elsewhere_are_the_same(photos: Path, begun: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(photos, tmp_path / "copy", copy_function=shutil.copyfile)
    assert resume(open_data(str(copy)), begun) == []


def test_other_labels_are_seen(data: ImageData, stopped: Path) -> None:
    train_split = data.split("train")
    other = replace(train_split, labels=1 - train_split.labels)
    changed = replace(data, splits={**data.splits, "train": other})
    assert "the labels or classes of the training images in memory are not those" in refused(changed, stopped)


def test_rows_of_parquet_that_change_are_seen(recipe: Recipe, photos: Path, tmp_path: Path) -> None:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    rows = [
        {"image": {"bytes": file.read_bytes()}, "label": file.parent.name}
        for file in sorted(photos.rglob("*.bmp"))
    ]
    file = tmp_path / "photos.parquet"

    def written(rows: list[dict]) -> ImageData:
        pq.write_table(pa.Table.from_pylist(rows), file)
        return open_data(str(file))

    train(written(rows), tmp_path / "run", recipe.changed(steps=8), listeners=[StopAt(5)])
    swapped = [rows[1], rows[0], *rows[2:]]
    assert "the content of 2 " in refused(written(swapped), tmp_path / "run")
    assert "no longer holds the training images" in refused(written(rows[:-2]), tmp_path / "run")
    assert resume(written(rows), tmp_path / "run") == []


@pytest.fixture
def damaged(photos: Path, recipe: Recipe, tmp_path: Path) -> Path:
    """A run on images of which one is damaged, which it came upon in its last step of the first epoch."""
    data = open_data(str(photos))
    last = np.random.default_rng([recipe.get("seed"), 0]).permutation(len(data.split("train")))[-1]
    bad = photos / data.split("train").names[last]
    bad.write_bytes(bad.read_bytes()[:60])
    with pytest.raises(VitralError, match="Mend or remove them, or raise max_damaged"):
        train(data, tmp_path / "damaged", recipe.changed(steps=12, checkpoint_steps=1))
    assert state(tmp_path / "damaged")["state"]["step"] == 3
    return tmp_path / "damaged"


@pytest.mark.parametrize("advice", ["mend", "remove", "raise"])
def test_the_advice_about_damaged_images_works(advice: str, photos: Path, damaged: Path) -> None:
    (bad,) = [file for file in photos.rglob("*.bmp") if file.stat().st_size == 60]
    change = NO_CHANGE
    if advice == "mend":
        shutil.copyfile(next(file for file in bad.parent.iterdir() if file != bad), bad)
    elif advice == "remove":
        bad.unlink()
    else:
        change = Recipe(max_damaged=0.1)
    said = " ".join(resume(open_data(str(photos)), damaged, change))
    assert summary(damaged)["steps"] == 12
    assert {"mend": "were mended", "remove": "1 damaged images were removed", "raise": "skipped"}[
        advice
    ] in said


def test_whatever_else_is_removed_is_refused(photos: Path, damaged: Path) -> None:
    (bad,) = [file for file in photos.rglob("*.bmp") if file.stat().st_size == 60]
    bad.unlink()
    next(photos.rglob("*.bmp")).unlink()
    assert "no longer holds the" in refused(open_data(str(photos)), damaged)


def test_of_many_images_some_are_looked_at() -> None:
    class Counting(list):
        asked = 0

        def __getitem__(self, index: Any) -> Any:
            self.asked += 1
            return bytes([index % 251]) * 10

    count = 30_000
    images = Counting([b""] * count)
    many = Split(images, np.zeros(count, dtype=np.int64), [str(number) for number in range(count)])
    contents = Contents.of(ImageData("many", ("a",), {"train": many, "val": split("val", 2)}))
    assert images.asked == 10_000
    fewer = replace(many, names=[*many.names[:-1], "another"])
    assert contents != Contents.of(ImageData("many", ("a",), {"train": fewer, "val": split("val", 2)}))


# --- Threads -------------------------------------------------------------------------------------


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


class Threads(Reporter):
    def __init__(self) -> None:
        self.counts: set[int] = set()
        self.messages: list[str] = []

    def step(self, run: Run) -> None:
        self.counts.add(torch.get_num_threads())

    def message(self, text: str) -> None:
        self.messages.append(text)


@pytest.mark.usefixtures("two_threads")
def test_a_run_keeps_to_its_threads_unless_told(data: ImageData, recipe: Recipe, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    train(data, folder, recipe.changed(steps=7), listeners=[StopAt(2)])
    torch.set_num_threads(1)
    kept, told = Threads(), Threads()
    train(data, folder, Recipe(), resume=True, listeners=[kept, StopAt(4)])
    assert kept.counts == {2}
    assert kept.messages == [
        "this run computes with 2 threads, as it began, not with the 1 of this process, which would change "
        "its results in the last digits; threads=1 takes 1"
    ]
    train(data, folder, Recipe(threads=1), resume=True, listeners=[told])
    assert told.counts == {1}
    assert told.messages == []
    assert torch.get_num_threads() == 1


# --- Older runs ----------------------------------------------------------------------------------


def made_older(folder: Path) -> None:
    """As runs were before they had a record."""
    (folder / "checkpoints/run.json").unlink()
    saved = state(folder)
    for name in ("run", "description"):
        del saved[name]
    torch.save(saved, folder / "checkpoints/state.pt")
    lines = (folder / "recipe.toml").read_text().splitlines()
    kept = [line for line in lines if not line.startswith(("keep_state", "threads"))]
    (folder / "recipe.toml").write_text("\n".join(kept) + "\n")


@pytest.mark.parametrize("last", ["whole", "gone"])
def test_an_older_run_goes_on(last: str, data: ImageData, stopped: Path, straight: Path) -> None:
    made_older(stopped)
    if last == "gone":
        shutil.rmtree(stopped / "last")
    assert resume(data, stopped) == []
    assert_same_end(straight, stopped)


def test_an_older_run_s_images_are_known_by_name(data: ImageData, stopped: Path) -> None:
    made_older(stopped)
    fewer = data.split("train").take(np.arange(8))
    assert "no longer holds the training images" in refused(
        replace(data, splits={**data.splits, "train": fewer}), stopped
    )


def test_a_run_of_another_version_is_not_called_damaged(data: ImageData, stopped: Path) -> None:
    saved = state(stopped)
    saved["state"]["patience"] = 3
    torch.save(saved, stopped / "checkpoints/state.pt")
    other = "by another version of Vitral, with patience; resume it with that version"
    assert refused(data, stopped).endswith(f"state.pt was written {other}")
    record = json.loads((stopped / "checkpoints/run.json").read_text())
    record["recipe"]["patience"] = 3
    (stopped / "checkpoints/run.json").write_text(json.dumps(record))
    edit(stopped, "batch_size = 4", "batch_size = 4\npatience = 3")
    assert refused(data, stopped) == f"this run was begun {other}"


# --- Settings that are taken back ------------------------------------------------------------------


def resolved(**settings: Any) -> Resolved:
    chosen = {"model": "ViT-Ti/16", "img_size": 32, "crop": "none", "flip": True, "rand_augment": 0.0}
    return Resolved.of({**read("small"), **chosen, "loss": "binary", "batch_size": 8, **settings})


def test_a_resumed_run_goes_back_to_defaults() -> None:
    begun = resolved(minutes=10, steps=5, max_damaged=0.3, threads=2, workers=7)
    asked = Recipe().with_words(["minutes=default", "max_damaged=default", "threads=default"])
    after = changed(begun, asked)
    assert after.limits.given() == [("steps", 5)]
    assert (after.images.max_damaged, after.machine.threads, after.machine.workers) == (0.01, 0, 7)
    assert after == begun.changed(minutes=math.inf, max_damaged=0.01, threads=0)


def test_a_default_may_be_asked_for_by_its_value() -> None:
    assert changed(resolved(steps=5, accumulate=4), Recipe(accumulate=1)).batches.accumulate == 1


def test_a_resumed_run_keeps_a_budget() -> None:
    with pytest.raises(VitralError, match="would have no budget; name epochs, steps or minutes"):
        changed(resolved(minutes=10), Recipe(minutes=None))


def test_what_a_run_computes_is_not_taken_back() -> None:
    with pytest.raises(VitralError, match="seed cannot change in a resumed run"):
        changed(resolved(steps=5, seed=3), Recipe(seed=None))


def test_a_state_of_before_the_score_had_its_name_is_read(data: ImageData, stopped: Path) -> None:
    saved = state(stopped)
    score = saved["state"]["best_top1"] = saved["state"].pop("best_score")
    torch.save(saved, stopped / "checkpoints/state.pt")
    found = RunFolder(stopped).saved(1, torch.device("cpu"))
    assert found is not None
    assert found.state.best_score == score
    resume(data, stopped)
