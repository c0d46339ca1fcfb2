"""What a user can get wrong ends in one line that helps, status 1 and no half-written run."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import vitral
from vitral.checkpoints.folder import Checkpoint, save_checkpoint
from vitral.cli import app as cli
from vitral.images.preprocess import Preprocess

SMALL: dict[str, Any] = {
    "img_size": (16, 24), "num_classes": 3, "embed_dim": 20, "num_heads": 5, "num_layers": 2
}  # fmt: skip


@dataclass(frozen=True)
class Outcome:
    status: int
    out: str
    err: str


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    """Runs ``vitral WORDS...`` in this process."""

    def run_vitral(*words: str | Path) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["vitral", *map(str, words)])
        monkeypatch.delenv("VITRAL_DEBUG", raising=False)
        with pytest.raises(SystemExit) as end:
            cli.main()
        assert isinstance(end.value.code, int)
        return Outcome(end.value.code, *capsys.readouterr())

    return run_vitral


@pytest.fixture(scope="session")
def saved_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = vitral.create("ViT-Pico/8", **SMALL)
    folder = tmp_path_factory.mktemp("model")
    save_checkpoint(folder, Checkpoint(model, Preprocess((16, 24)), ("ant", "bee", "cat")))
    return folder


@pytest.fixture
def model(saved_model: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return shutil.copytree(saved_model, tmp_path / "model")


def lay(root: Path, *names: str) -> Path:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (24, 20), (len(name), 0, 0)).save(path)
    return root


def assert_one_line(outcome: Outcome, text: str) -> None:
    assert outcome.status == 1
    assert outcome.out == ""
    assert outcome.err.startswith("vitral: ")
    assert outcome.err.count("\n") == 1
    assert outcome.err.endswith("\n")
    assert text in outcome.err
    assert "defect" not in outcome.err


# --- train -----------------------------------------------------------------------------------------

BAD_DATA = {
    "no class": ([], "holds no images in class folders; put each class's images in a folder of its name"),
    "one class": (["ant/1.png"], "has one class only, 'ant'"),
    "a class without test images": (
        ["train/ant/1.png", "train/bee/1.png", "test/ant/1.png", "test/bee/deep/.hidden.png"],
        "no images of bee in 'test'",
    ),
    "differing classes": (
        ["train/ant/1.png", "train/bee/1.png", "val/ant/1.png", "val/dog/1.png"],
        "differ: only in the first: bee; only in the second: dog",
    ),
}


@pytest.mark.parametrize(("files", "text"), BAD_DATA.values(), ids=BAD_DATA.keys())
def test_train_on_unusable_data(
    run: Callable[..., Outcome], tmp_path: Path, files: list[str], text: str
) -> None:
    (tmp_path / "data").mkdir()
    assert_one_line(run("train", lay(tmp_path / "data", *files), "--out", tmp_path / "out"), text)
    assert not (tmp_path / "out").exists()


def test_train_on_a_missing_folder(run: Callable[..., Outcome], tmp_path: Path) -> None:
    assert_one_line(
        run("train", tmp_path / "gone", "--out", tmp_path / "out"), "gone does not exist; DATA is"
    )
    assert not (tmp_path / "out").exists()


BAD_SETTINGS = {
    "epoch=3": "there is no setting 'epoch'; did you mean 'epochs'?",
    "lerning_rate=1": "did you mean 'learning_rate'?",
    "epochs=abc": "epochs='abc': input should be a valid number",
    "batch_size=0": "batch_size=0: it must be a whole number from 1 to 1,048,576",
    "batch_size=999": "batch_size=999 is more than the 30 training images",
    "device=tpu": "device='tpu': input should be 'auto', 'cpu', 'cuda' or 'mps'",
    "crop=middle": "crop='middle': input should be 'padded', 'resized', 'simple' or 'none'",
    "epochs": "'epochs' is not a setting; write key=value, for example epochs=20",
    "model=ViT-C/16": "there is no model 'ViT-C/16'; did you mean 'ViT-",
    "model=vit-b/16": "did you mean 'ViT-B/16'?",
    "img_size=33": "img_size is 33x33, which patch_size 4 does not divide",
    "val_fraction=1": "val_fraction=1: it must be a number from 0 to below 1",
}


@pytest.mark.parametrize(("setting", "text"), BAD_SETTINGS.items())
def test_train_with_a_bad_setting(
    run: Callable[..., Outcome], image_folder: Path, tmp_path: Path, setting: str, text: str
) -> None:
    assert_one_line(run("train", image_folder, "--out", tmp_path / "out", setting), text)
    assert not (tmp_path / "out").exists()


def test_train_with_a_missing_recipe(run: Callable[..., Outcome], image_folder: Path, tmp_path: Path) -> None:
    outcome = run("train", image_folder, "--out", tmp_path / "out", "--recipe", tmp_path / "gone.toml")
    assert_one_line(outcome, "there is no file")
    assert not (tmp_path / "out").exists()


def test_train_with_a_recipe_that_is_not_toml(
    run: Callable[..., Outcome], image_folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "bad.toml").write_text("epochs: 3\n")
    outcome = run("train", image_folder, "--out", tmp_path / "out", "--recipe", tmp_path / "bad.toml")
    assert_one_line(outcome, "bad.toml is not TOML")
    assert not (tmp_path / "out").exists()


def test_train_over_an_existing_run(run: Callable[..., Outcome], image_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "recipe.toml").write_text("epochs = 1.0\n")
    outcome = run("train", image_folder, "--out", tmp_path)
    assert_one_line(outcome, "already holds a run; go on with --resume, or choose another --out")
    assert (tmp_path / "recipe.toml").read_text() == "epochs = 1.0\n"


def test_resume_without_a_run(run: Callable[..., Outcome], image_folder: Path, tmp_path: Path) -> None:
    outcome = run("train", image_folder, "--out", tmp_path / "out", "--resume")
    assert_one_line(outcome, "holds no run to resume; leave out --resume to begin one")
    assert not (tmp_path / "out").exists()


# --- The model folder ------------------------------------------------------------------------------


def edit_config(folder: Path, **changes: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "folder missing": (shutil.rmtree, "model does not exist; a model is a folder that vitral train wrote"),
    "no config": (
        lambda folder: (folder / "config.json").unlink(),
        "has no config.json; a model is a folder",
    ),
    "cut config": (lambda folder: cut(folder / "config.json"), "config.json is not JSON"),
    "a list": (
        lambda folder: (folder / "config.json").write_text("[]"),
        "is not the config of a model; it holds a list",
    ),
    "an empty config": (
        lambda folder: (folder / "config.json").write_text("{}"),
        "config.json cannot be used",
    ),
    "an unknown field": (
        lambda folder: edit_config(folder, architecture={"embed_dims": 20}),
        "there is no setting 'embed_dims'; did you mean 'embed_dim'?",
    ),
    "other labels": (lambda folder: edit_config(folder, labels=["ant"]), "config.json cannot be used"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "the model folder is incomplete"),
    "cut weights": (lambda folder: cut(folder / "model.safetensors"), "safetensors is damaged or incomplete"),
    "no bytes": (lambda folder: (folder / "model.safetensors").write_bytes(b""), "damaged or incomplete"),
    "other weights": (
        lambda folder: edit_config(folder, architecture={**SMALL, "patch_size": 8, "num_layers": 3}),
        "model.safetensors does not fit",
    ),
}


@pytest.mark.parametrize(("damage", "text"), DAMAGE.values(), ids=DAMAGE.keys())
def test_predict_with_an_unusable_model(
    run: Callable[..., Outcome], model: Path, tmp_path: Path, damage: Callable[[Path], Any], text: str
) -> None:
    damage(model)
    assert_one_line(run("predict", model, lay(tmp_path, "photo.png")), text)


def test_fine_tuning_an_unusable_model_writes_nothing(
    run: Callable[..., Outcome], model: Path, image_folder: Path, tmp_path: Path
) -> None:
    cut(model / "model.safetensors")
    outcome = run("train", image_folder, "--out", tmp_path / "out", f"model={model}")
    assert_one_line(outcome, "damaged or incomplete")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", ["eval", "info"])
def test_other_commands_with_a_missing_model(
    run: Callable[..., Outcome], image_folder: Path, tmp_path: Path, command: str
) -> None:
    words = [image_folder] if command == "eval" else []
    assert_one_line(run(command, tmp_path / "gone", *words), "gone")


# --- eval ------------------------------------------------------------------------------------------


def test_eval_on_classes_that_the_model_lacks(
    run: Callable[..., Outcome], model: Path, tmp_path: Path
) -> None:
    data = lay(tmp_path / "data", "ant/1.png", "ant/2.png", "dog/1.png", "dog/2.png")
    assert_one_line(run("eval", model, data), "has classes that the model lacks: dog; it knows ant, bee, cat")


def test_eval_on_a_split_that_is_not_there(
    run: Callable[..., Outcome], model: Path, image_folder: Path
) -> None:
    assert_one_line(
        run("eval", model, image_folder, "--split", "test"), "has no 'test' split; it has 'train'"
    )


def test_eval_stops_at_too_many_damaged_images(
    run: Callable[..., Outcome], model: Path, image_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Worker processes would live on until the exception is collected, at a cost to later tests.
    monkeypatch.setattr("vitral.data.workers.cpu_count", lambda: 0)
    cut(image_folder / "bee/003.png")
    outcome = run("eval", model, image_folder, "--split", "all")
    named, limit = outcome.err.splitlines()
    assert named.startswith("vitral: skipped damaged image bee/003.png: ")
    assert limit.startswith("vitral: 1 of 36 images are damaged, more than the limit of 1.0%: bee/003.png. ")
    assert (outcome.status, outcome.out) == (1, "")


# --- predict ---------------------------------------------------------------------------------------

DAMAGED = {
    "2.jpg": "cannot be decoded: image file is truncated",
    "5.jpg": "not an image, or of a format that Vitral does not read (JPEG",
    "8.jpg": "not an image, or of a format that Vitral does not read (JPEG",
}


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Ten, of which three are damaged: truncated, a text file and zero bytes."""
    folder = tmp_path / "photos"
    folder.mkdir()
    generator = np.random.default_rng(0)
    for number in range(10):
        pixels = generator.integers(0, 256, (40, 30, 3)).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.jpg")
    cut(folder / "2.jpg")
    (folder / "5.jpg").write_text("I am a text file.")
    (folder / "8.jpg").write_bytes(b"")
    return folder


def test_predict_answers_for_the_good_and_names_the_damaged(
    run: Callable[..., Outcome], model: Path, photos: Path
) -> None:
    outcome = run("predict", model, photos, "--batch-size", "4")
    good = [f"{photos}/{number}.jpg" for number in (0, 1, 3, 4, 6, 7, 9)]
    assert [line.partition(": ")[0] for line in outcome.out.splitlines()] == good
    *named, count = outcome.err.splitlines()
    for line, (name, reason) in zip(named, DAMAGED.items(), strict=True):
        assert line.startswith(f"vitral: {photos}/{name}: {reason}")
    assert count == "vitral: 3 of 10 images could not be read"
    assert outcome.status == 1


def test_predict_json_answers_for_every_image(run: Callable[..., Outcome], model: Path, photos: Path) -> None:
    outcome = run("predict", model, photos, "--json", "--top", "2")
    answers = [json.loads(line) for line in outcome.out.splitlines()]
    assert [answer["image"] for answer in answers] == [f"{photos}/{number}.jpg" for number in range(10)]
    for answer in answers:
        assert answer.keys() == {"image", "top", "error"}
        reason = DAMAGED.get(Path(answer["image"]).name)
        if reason:
            assert answer["top"] == []
            assert answer["error"].startswith(reason)
        else:
            assert answer["error"] is None
            assert [top.keys() for top in answer["top"]] == [{"label", "probability"}] * 2
    assert outcome.status == 1


def test_predict_names_a_missing_file_and_goes_on(
    run: Callable[..., Outcome], model: Path, tmp_path: Path
) -> None:
    lay(tmp_path, "here.png")
    outcome = run("predict", model, tmp_path / "gone.png", tmp_path / "here.png")
    assert outcome.out.startswith(f"{tmp_path}/here.png: ")
    assert outcome.err.splitlines()[0].endswith(f"there is no file {tmp_path}/gone.png")
    assert outcome.status == 1


def test_predict_names_a_folder_that_cannot_be_listed(
    run: Callable[..., Outcome], model: Path, image_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scan = os.scandir

    def scandir(path: Any) -> Any:
        if Path(path).name == "bee":
            raise PermissionError(13, "Permission denied")
        return scan(path)

    monkeypatch.setattr(os, "scandir", scandir)
    outcome = run("predict", model, image_folder)
    assert outcome.status == 1
    assert len(outcome.out.splitlines()) == 24
    assert f"{image_folder}/bee may not be listed: permission is missing" in outcome.err
    assert "1 folders could not be listed" in outcome.err


def test_predict_does_not_wait_for_a_named_pipe(
    run: Callable[..., Outcome], model: Path, tmp_path: Path
) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    outcome = run("predict", model, tmp_path / "pipe.png")
    assert outcome.status == 1
    assert "pipe.png: is a named pipe; only regular files are read" in outcome.err


def test_predict_with_no_images(run: Callable[..., Outcome], model: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert_one_line(run("predict", model, tmp_path / "empty"), "empty holds no images")


def test_a_newline_in_a_name_is_shown_and_not_printed(
    run: Callable[..., Outcome], model: Path, tmp_path: Path
) -> None:
    assert_one_line(run("predict", model, tmp_path / "two\nlines*.png"), r"two\nlines*.png holds no images")


# --- The process -----------------------------------------------------------------------------------


def test_a_real_process_ends_with_status_1_and_no_traceback(tmp_path: Path) -> None:
    words = ["-m", "vitral", "train", "gone", "--out", "out"]
    ended = subprocess.run(
        [sys.executable, *words], cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False
    )
    assert_one_line(Outcome(ended.returncode, ended.stdout, ended.stderr), "gone does not exist; DATA is")
    assert list(tmp_path.iterdir()) == []


def test_wrong_usage_is_status_2(run: Callable[..., Outcome]) -> None:
    assert run("train").status == 2
