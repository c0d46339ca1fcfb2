"""A run that was stopped or killed, and taken up again, ends with the bits of one that never was."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.conftest import Reporter, StopAt, write_images
from vitral.checkpoints.folder import Checkpoint, load_checkpoint, save_checkpoint
from vitral.data.image_data import ImageData, open_data
from vitral.images.preprocess import Preprocess
from vitral.model.vit import VisionTransformer
from vitral.recipes.recipe import Recipe
from vitral.runtime.errors import VitralError
from vitral.training.loop import train
from vitral.training.run import Run

# Four steps of seven images per epoch, two images left over; a checkpoint every three steps.
STEPS, STEPS_PER_EPOCH, CHECKPOINT_STEPS = 14, 4, 3
ALL_THAT_IS_RANDOM: dict[str, Any] = {
    "mixup": 0.3,
    "cutmix": 0.5,
    "dropout": 0.1,
    "drop_path": 0.3,
    "rand_augment": 7,
    "rand_augment_share": 0.5,
    "three_augment": True,
    "color_jitter": 0.3,
    "erasing": 0.5,
    "repeats": 3,
}


class Crash(Exception):
    pass


class CrashAt(Reporter):
    """Ends the run in the middle of a step's work, with no chance to save."""

    def __init__(self, step: int) -> None:
        self.at = step

    def step(self, run: Run) -> None:
        if run.state.step == self.at:
            raise Crash


@pytest.fixture
def data(image_folder: Path) -> ImageData:
    """30 images to train on."""
    return open_data(str(image_folder))


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    """A short run of a tiny model with everything on that draws random numbers."""
    model = VisionTransformer(16, 8, embed_dim=16, num_layers=2, num_heads=2, num_classes=2)
    save_checkpoint(tmp_path / "base", Checkpoint(model, Preprocess((16, 16)), ("x", "y")))
    return Recipe(
        model=str(tmp_path / "base"),
        steps=STEPS,
        batch_size=7,
        learning_rate=3e-3,
        checkpoint_steps=CHECKPOINT_STEPS,
        keep_state=True,
        workers=0,
        seed=3,
        device="cpu",
        precision="float32",
        **ALL_THAT_IS_RANDOM,
    )


def state(folder: Path) -> dict[str, Any]:
    return torch.load(folder / "checkpoints" / "state.pt", weights_only=True)


def tensors(value: Any) -> list[Tensor]:
    """Every tensor in nested dictionaries and lists."""
    if isinstance(value, Tensor):
        return [value]
    children = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [tensor for child in children for tensor in tensors(child)]


def metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def validations(folder: Path) -> list[dict[str, Any]]:
    """All of them but the time."""
    clocks = {"seconds": 0, "time": {}}
    return [record | clocks for record in metrics(folder)]


def assert_same_run(one: Path, other: Path) -> None:
    for file in ("model.safetensors", "config.json", "last/model.safetensors"):
        assert (one / file).read_bytes() == (other / file).read_bytes(), file
    states, clocks = (state(one), state(other)), {"seconds": 0, "time": {}}
    for part in ("model", "average", "optimizer"):
        pairs = [tensors(saved[part]) for saved in states]
        assert len(pairs[0]) > 20
        assert all(torch.equal(a, b) for a, b in zip(*pairs, strict=True)), part
    assert states[0]["state"] | clocks == states[1]["state"] | clocks
    assert validations(one) == validations(other)


# --- Bit for bit ---------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_stopped_again_and_again_ends_the_same(
    workers: int, data: ImageData, recipe: Recipe, tmp_path: Path
) -> None:
    train(data, tmp_path / "straight", recipe)
    stops = (1, 5, 8, 11)
    stopped = [train(data, tmp_path / "stopped", recipe, listeners=[StopAt(1)])]
    for _ in stops:
        stopped.append(
            train(
                data, tmp_path / "stopped", Recipe(workers=workers), resume=True, listeners=[StopAt(*stops)]
            )
        )
    assert [summary.steps for summary in stopped] == [*stops, STEPS]
    assert [summary.finished for summary in stopped] == [False] * len(stops) + [True]
    assert_same_run(tmp_path / "straight", tmp_path / "stopped")


@pytest.mark.parametrize(
    "step",
    [
        pytest.param(2, id="before the first checkpoint"),
        pytest.param(5, id="after an epoch that no checkpoint holds"),
        pytest.param(8, id="at the end of an epoch"),
        pytest.param(13, id="in the last epoch"),
    ],
)
def test_a_run_that_crashed_ends_the_same(step: int, data: ImageData, recipe: Recipe, tmp_path: Path) -> None:
    train(data, tmp_path / "straight", recipe)
    with pytest.raises(Crash):
        train(data, tmp_path / "crashed", recipe, listeners=[CrashAt(step)])
    train(data, tmp_path / "crashed", Recipe(), resume=True)
    assert_same_run(tmp_path / "straight", tmp_path / "crashed")


def test_an_epoch_measured_before_any_checkpoint_is_not_measured_twice(
    data: ImageData, recipe: Recipe, tmp_path: Path
) -> None:
    rarely = recipe.changed(checkpoint_steps=100)
    with pytest.raises(Crash):
        train(data, tmp_path / "run", rarely, listeners=[CrashAt(STEPS_PER_EPOCH + 1)])
    train(data, tmp_path / "run", Recipe(), resume=True)
    assert [record["step"] for record in metrics(tmp_path / "run")] == [0, 4, 8, 12, 14]


def test_a_crash_between_the_files_of_a_checkpoint_does_no_harm(
    data: ImageData, recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def crash(*_: Any) -> None:
        raise Crash

    train(data, tmp_path / "straight", recipe)
    train(data, tmp_path / "crashed", recipe, listeners=[StopAt(5)])
    with monkeypatch.context() as patched:
        patched.setattr(torch, "save", crash)
        with pytest.raises(Crash):
            train(data, tmp_path / "crashed", Recipe(), resume=True)
    train(data, tmp_path / "crashed", Recipe(), resume=True)
    assert_same_run(tmp_path / "straight", tmp_path / "crashed")


_KILLED_RUN = """
import json, os, signal, sys
from pathlib import Path
from vitral.data.image_data import open_data
from vitral.recipes.recipe import Recipe
from tests.conftest import Reporter
from vitral.training.loop import train

source, folder, settings, step = json.loads(sys.argv[1])

class Kill(Reporter):
    def step(self, run):
        if run.state.step == step:
            os.kill(os.getpid(), signal.SIGKILL)

train(open_data(source), Path(folder), Recipe(**settings), listeners=[Kill()])
"""


@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_killed_in_the_middle_of_an_epoch_ends_the_same(
    workers: int, data: ImageData, recipe: Recipe, tmp_path: Path
) -> None:
    train(data, tmp_path / "straight", recipe)
    settings = {**recipe.given, "workers": workers}
    order = json.dumps([data.source, str(tmp_path / "killed"), settings, 5])
    killed = subprocess.run([sys.executable, "-c", _KILLED_RUN, order], timeout=120)
    assert killed.returncode == -signal.SIGKILL
    # What was being written when it came may be lost, and is made again.
    saved = tmp_path / "killed/checkpoints/state.pt"
    assert not saved.exists() or state(tmp_path / "killed")["state"]["step"] == 3
    train(data, tmp_path / "killed", Recipe(), resume=True)
    assert_same_run(tmp_path / "straight", tmp_path / "killed")


# --- The command line ----------------------------------------------------------------------------


def send(process: subprocess.Popen, number: int, *, to_group: bool) -> None:
    if to_group:
        os.killpg(process.pid, number)
    else:
        process.send_signal(number)


@pytest.mark.parametrize(
    ("number", "to_group", "workers"),
    [
        pytest.param(signal.SIGTERM, False, 0, id="SIGTERM"),
        pytest.param(signal.SIGHUP, True, 2, id="SIGHUP of a closed terminal, which reaches the workers too"),
        pytest.param(signal.SIGINT, True, 2, id="Ctrl-C, which reaches the workers too"),
        pytest.param(signal.SIGTERM, True, 2, id="SIGTERM from timeout, which reaches the workers too"),
    ],
)
def test_a_signal_ends_the_command_well_and_names_resume(
    number: int, to_group: bool, workers: int, image_folder: Path, recipe: Recipe, tmp_path: Path
) -> None:
    words = [f"model={recipe.get('model')}", "steps=500", "checkpoint_steps=10", f"workers={workers}"]
    command = [sys.executable, "-m", "vitral", "train", str(image_folder), "--out", str(tmp_path / "run")]
    process = subprocess.Popen(
        [*command, *words, "batch_size=7", "device=cpu", "precision=float32"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    while not (tmp_path / "run" / "checkpoints" / "state.pt").exists() and process.poll() is None:
        time.sleep(0.01)
    send(process, number, to_group=to_group)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 128 + number, err
    assert "Traceback" not in err
    stopped = re.match(r"stopped after step (\d+); go on with: vitral train .* --resume\n", out)
    assert stopped
    assert state(tmp_path / "run")["state"]["step"] == int(stopped[1]) < 500


# --- What may change -----------------------------------------------------------------------------


@pytest.fixture
def stopped(data: ImageData, recipe: Recipe, tmp_path: Path) -> Path:
    """A run stopped after five of its steps."""
    train(data, tmp_path / "stopped", recipe, listeners=[StopAt(5)])
    return tmp_path / "stopped"


@pytest.mark.parametrize(
    "change",
    [
        {"batch_size": 8},
        {"learning_rate": 1e-4},
        {"seed": 4},
        {"model": "ViT-Pico/8"},
        {"img_size": 24},
        {"dropout": 0.5},
        {"val_fraction": 0.3},
        {"crop": "none"},
        {"precision": "bfloat16"},
        {"layer_decay": 1.0},
    ],
    ids=str,
)
def test_what_a_run_computes_cannot_change(change: dict[str, Any], data: ImageData, stopped: Path) -> None:
    (name,) = change
    with pytest.raises(VitralError) as caught:
        train(data, stopped, Recipe(**change), resume=True)
    assert str(caught.value) == (
        f"{name} cannot change in a resumed run; "
        "what can: accumulate, checkpoint_layers, checkpoint_steps, device, epochs, eval_epochs, image_root, "
        "keep_state, max_damaged, minutes, report, shard, steps, threads, track, workers"
    )


def test_the_same_settings_may_be_repeated(data: ImageData, recipe: Recipe, stopped: Path) -> None:
    assert train(data, stopped, recipe, resume=True).finished


def test_a_larger_budget_takes_a_finished_run_further(
    data: ImageData, recipe: Recipe, tmp_path: Path
) -> None:
    one_epoch = recipe.changed(steps=None, epochs=1)
    assert train(data, tmp_path / "run", one_epoch).steps == STEPS_PER_EPOCH
    assert train(data, tmp_path / "run", Recipe(epochs=3), resume=True).steps == 3 * STEPS_PER_EPOCH
    assert [record["step"] for record in metrics(tmp_path / "run")] == [0, 4, 8, 12]


def test_an_enlarged_budget_is_remembered(data: ImageData, recipe: Recipe, stopped: Path) -> None:
    train(data, stopped, Recipe(steps=STEPS + 4), resume=True, listeners=[StopAt(STEPS + 1)])
    assert train(data, stopped, Recipe(), resume=True).steps == STEPS + 4


def test_time_is_counted_over_all_sessions(data: ImageData, stopped: Path) -> None:
    saved = state(stopped)
    saved["state"]["seconds"] = 1000.0
    torch.save(saved, stopped / "checkpoints" / "state.pt")
    summary = train(data, stopped, Recipe(), resume=True)
    assert 1000 < summary.seconds < 1060


# --- What is refused -----------------------------------------------------------------------------


def test_a_finished_run_is_not_resumed(data: ImageData, recipe: Recipe, tmp_path: Path) -> None:
    train(data, tmp_path / "run", recipe)
    with pytest.raises(VitralError, match=r"run is finished; name a larger budget to go on"):
        train(data, tmp_path / "run", Recipe(), resume=True)


def test_a_folder_without_a_run_is_not_resumed(data: ImageData, tmp_path: Path) -> None:
    with pytest.raises(VitralError, match="holds no run to resume; leave out --resume to begin one"):
        train(data, tmp_path / "nothing", Recipe(), resume=True)


@pytest.mark.parametrize("change", ["added", "removed", "renamed"])
def test_changed_training_images_are_refused(change: str, image_folder: Path, stopped: Path) -> None:
    if change == "added":
        write_images(image_folder, {"bee": 20}, seed=1)
    else:
        files = list((image_folder / "bee").iterdir())
        for file in files[:6]:
            file.unlink() if change == "removed" else file.rename(file.with_stem(f"new {file.stem}"))
    with pytest.raises(VitralError, match=r"no longer holds the training images that .* began with"):
        train(open_data(str(image_folder)), stopped, Recipe(), resume=True)


@pytest.mark.parametrize("content", [b"", b"damage", None], ids=["empty", "other", "truncated"])
def test_a_damaged_state_is_named(content: bytes | None, data: ImageData, stopped: Path) -> None:
    file = stopped / "checkpoints" / "state.pt"
    file.write_bytes(file.read_bytes()[:-1000] if content is None else content)
    with pytest.raises(VitralError, match=r"state\.pt is damaged and cannot be resumed"):
        train(data, stopped, Recipe(), resume=True)


# --- What a stopped run leaves -------------------------------------------------------------------


def test_a_stopped_run_has_no_summary_yet(stopped: Path) -> None:
    assert not (stopped / "summary.json").exists()


def test_a_stopped_run_has_its_last_model(data: ImageData, stopped: Path) -> None:
    last = load_checkpoint(stopped / "last")
    assert last.labels == data.classes
    assert all(
        torch.equal(tensor, state(stopped)["average"][name])
        for name, tensor in last.model.state_dict().items()
    )


def test_a_run_leaves_no_stray_files(data: ImageData, stopped: Path) -> None:
    train(data, stopped, Recipe(), resume=True)
    assert sorted(str(file.relative_to(stopped)) for file in stopped.rglob("*") if file.is_file()) == [
        "checkpoints/run.json",
        "checkpoints/state.pt",
        "config.json",
        "last/config.json",
        "last/model.safetensors",
        "metrics.jsonl",
        "model.safetensors",
        "recipe.toml",
        "summary.json",
    ]
