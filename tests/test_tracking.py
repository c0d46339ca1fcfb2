"""Trackers are given what a checkpoint covers, once, and can neither stop nor change a run."""

import importlib.util
import json
import threading
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import pytest

from tests.conftest import Reporter
from tests.test_resume import Crash, CrashAt
from vitral.checkpoints.folder import Checkpoint, save_checkpoint
from vitral.data.image_data import ImageData, open_data
from vitral.images.preprocess import Preprocess
from vitral.model.vit import VisionTransformer
from vitral.recipes.recipe import Recipe
from vitral.runtime.errors import VitralError
from vitral.training.loop import train
from vitral.training.tracking import tracking as module
from vitral.training.tracking.trackers import TRACKERS, Tracked


@pytest.fixture
def data(image_folder: Path) -> ImageData:
    return open_data(str(image_folder))


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    """Four steps an epoch, an evaluation each, a checkpoint every six steps; it ends after the fourteenth."""
    model = VisionTransformer(16, 8, embed_dim=16, num_layers=1, num_heads=2, num_classes=2)
    save_checkpoint(tmp_path / "base", Checkpoint(model, Preprocess((16, 16)), ("x", "y")))
    return Recipe(
        model=str(tmp_path / "base"), steps=14, batch_size=7, checkpoint_steps=6, workers=0, device="cpu",
        precision="float32", probe_head=False, keep_state=True, track="tensorboard",
    )  # fmt: skip


class Fake:
    """A tracker that notes what it was given, and which checkpoint was on disk then."""

    given: ClassVar[list[tuple[int, dict[str, float], int]]] = []
    ends: ClassVar[list[tuple[dict[str, float], bool]]] = []
    begun: ClassVar[list[Tracked]] = []

    def __init__(self, run: Tracked) -> None:
        self.begun.append(run)
        self.run, self.known_as, self.step = run, f"fake {run.id}", run.step

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        import torch

        there = torch.load(self.run.folder / "checkpoints" / "state.pt", weights_only=True)
        self.given.append((step, dict(figures), there["state"]["step"]))

    def end(self, figures: Mapping[str, float], *, finished: bool) -> None:
        self.ends.append((dict(figures), finished))


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> type[Fake]:
    Fake.given, Fake.ends, Fake.begun = [], [], []
    Hanging.release.clear()
    monkeypatch.setitem(TRACKERS, "tensorboard", ("json", Fake))
    return Fake


class Messages(Reporter):
    def __init__(self) -> None:
        self.texts: list[str] = []

    def message(self, text: str) -> None:
        self.texts.append(text)


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_tracker_gets_each_line_once_and_after_its_checkpoint(
    data: ImageData, recipe: Recipe, tmp_path: Path, fake: type[Fake]
) -> None:
    with pytest.raises(Crash):  # after the evaluation of step 8, before the checkpoint that covers it
        train(data, tmp_path / "run", recipe, listeners=[CrashAt(9)])
    assert [step for step, _, _ in fake.given] == [0, 4]
    assert fake.ends == [({}, False)]
    train(data, tmp_path / "run", Recipe(), resume=True)
    expected = lines(tmp_path / "run")
    assert [step for step, _, _ in fake.given] == [line["step"] for line in expected] == [0, 4, 8, 12, 14]
    assert all(step <= checkpoint for step, _, checkpoint in fake.given)
    for (_, figures, _), line in zip(fake.given, expected, strict=True):
        assert figures["val_loss"] == line["val_loss"]
        assert figures["time/stepping"] == line["time"]["stepping"]
        assert "step" not in figures
    assert len({run.id for run in fake.begun}) == 1
    assert [(run.known_as, run.step) for run in fake.begun] == [(None, -1), (f"fake {fake.begun[0].id}", 4)]
    end, finished = fake.ends[-1]
    assert finished
    assert end["end/best_step"] in (0, 4, 8, 12, 14)


def test_what_was_covered_and_not_given_is_given_on_resume(
    data: ImageData, recipe: Recipe, tmp_path: Path, fake: type[Fake]
) -> None:
    with pytest.raises(Crash):
        train(data, tmp_path / "run", recipe, listeners=[CrashAt(7)])
    (tmp_path / "run" / "checkpoints" / "tracked-tensorboard.json").unlink()  # killed between the two
    fake.given.clear()
    train(data, tmp_path / "run", Recipe(), resume=True)
    assert [step for step, _, _ in fake.given] == [0, 4, 8, 12, 14]


class Failing(Fake):
    def log(self, step: int, figures: Mapping[str, float]) -> None:
        raise ConnectionError("the service\nis away")


class Hanging(Fake):
    release: ClassVar[threading.Event] = threading.Event()

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        self.release.wait(20)


@pytest.mark.parametrize(
    ("tracker", "reason"),
    [(Failing, "the service is away"), (Hanging, "it did not take the last figures within 0.2 s")],
)
def test_a_tracker_that_fails_or_hangs_is_told_once_and_changes_nothing(
    data: ImageData,
    recipe: Recipe,
    tmp_path: Path,
    fake: type[Fake],
    monkeypatch: pytest.MonkeyPatch,
    tracker: type[Fake],
    reason: str,
) -> None:
    monkeypatch.setitem(TRACKERS, "tensorboard", ("json", tracker))
    monkeypatch.setattr(module, "_SECONDS_TO_END", 0.2)
    told = Messages()
    summary = train(data, tmp_path / "run", recipe, listeners=[told])
    Hanging.release.set()
    alone = train(data, tmp_path / "alone", recipe.changed(track=None))
    assert summary.finished
    assert summary.test == alone.test
    ours, theirs = (
        [
            {name: value for name, value in line.items() if name not in ("seconds", "time")}
            for line in lines(run)
        ]
        for run in (tmp_path / "run", tmp_path / "alone")
    )
    assert ours == theirs
    assert (tmp_path / "run" / "model.safetensors").read_bytes() == (
        tmp_path / "alone" / "model.safetensors"
    ).read_bytes()
    assert [text for text in told.texts if "tensorboard" in text] == [
        f"tensorboard does not follow this run any more: {reason}"
    ]


def test_a_missing_package_is_named_before_anything_is_written(
    data: ImageData, recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(TRACKERS, "wandb", ("no_such_package", Fake))
    with pytest.raises(
        VitralError, match=r"track=wandb needs no_such_package: pip install 'vitral\[wandb\]'"
    ):
        train(data, tmp_path / "run", recipe.changed(track="wandb"))
    assert not (tmp_path / "run").exists()


def test_the_setting_is_a_list_of_words_and_may_change() -> None:
    recipe = Recipe().with_words(["track=tensorboard,mlflow"])
    assert recipe.get("track") == ("tensorboard", "mlflow")
    assert recipe == Recipe(track=["tensorboard", "mlflow"])
    with pytest.raises(VitralError, match="track"):
        Recipe(track="tensorbord")


def test_tensorboard_shows_what_the_file_of_metrics_has(
    data: ImageData, recipe: Recipe, tmp_path: Path
) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with pytest.raises(Crash):
        train(data, tmp_path / "run", recipe, listeners=[CrashAt(9)])
    train(data, tmp_path / "run", Recipe(), resume=True)
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    for name in ("val_loss", "learning_rate"):
        shown = [(event.step, event.value) for event in events.Scalars(name)]
        expected = [(line["step"], pytest.approx(line[name], rel=1e-6)) for line in lines(tmp_path / "run")]
        assert shown == expected
    assert events.Tags()["tensors"] == ["recipe/text_summary"]


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("mlflow") is None, reason="mlflow is not installed")
def test_mlflow_has_each_step_once_after_a_crash(
    data: ImageData, recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    warnings.simplefilter("ignore")
    from mlflow import MlflowClient

    recipe = recipe.changed(track="mlflow")
    told = Messages()
    with pytest.raises(Crash):
        train(data, tmp_path / "run", recipe, listeners=[CrashAt(9), told])
    note = tmp_path / "run" / "checkpoints" / "tracked-mlflow.json"
    known = json.loads(note.read_bytes())
    note.write_text(json.dumps({**known, "step": -1}))  # as if killed before it was noted
    train(data, tmp_path / "run", Recipe(), resume=True, listeners=[told])
    assert [text for text in told.texts if "mlflow" in text] == []
    client = MlflowClient(tracking_uri=f"sqlite:///{tmp_path / 'mlflow.db'}")
    there = client.get_run(known["known_as"])
    history = client.get_metric_history(known["known_as"], "val_loss")
    assert [(point.step, point.value) for point in history] == [
        (line["step"], line["val_loss"]) for line in lines(tmp_path / "run")
    ]
    assert there.info.status == "FINISHED"
    assert there.data.params["batch_size"] == "7"


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("wandb") is None, reason="wandb is not installed")
def test_wandb_is_offline_without_a_key(
    data: ImageData, recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))
    warnings.simplefilter("ignore")
    told = Messages()
    train(data, tmp_path / "run", recipe.changed(track="wandb"), listeners=[told])
    assert [text for text in told.texts if "wandb" in text] == []
    run = json.loads((tmp_path / "run" / "checkpoints" / "run.json").read_bytes())["id"]
    (folder,) = (tmp_path / "run" / "wandb").glob("offline-run-*")
    assert folder.name.endswith(run)
    assert list(folder.glob("*.wandb"))
