"""A module of the user's own in the place of our model: it is trained, taken up again, loaded and judged."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import vitral
from vitral.cli import app as cli
from vitral.data.image_data import open_data
from vitral.runtime.errors import VitralError
from vitral.training.events import Event, StepDone
from vitral.training.state import Summary

SETTINGS: dict[str, Any] = {
    "img_size": 8, "batch_size": 64, "workers": 0, "device": "cpu", "precision": "float32",
    "keep_state": True,
}  # fmt: skip


class TinyNet(nn.Module):
    """Convolutions with batch norms, dropout and a lazy layer: buffers, randomness, and a size of images."""

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.Flatten(), nn.Dropout(0.1),
        )  # fmt: skip
        self.logits = nn.LazyLinear(classes)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        return self.logits(self.body(images_BCHW))


def tiny(seed: int = 0) -> TinyNet:
    torch.manual_seed(seed)
    return TinyNet()


def train(out: Path, model: object, **settings: Any) -> Summary:
    wanted: dict[str, Any] = {"model": model, "steps": 60, **SETTINGS, **settings}
    return vitral.train("digits", out, **wanted)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("own") / "run"
    summary = train(folder, tiny())
    assert summary.finished
    assert summary.val_top1 is not None
    assert summary.val_top1 > 0.6  # chance is 0.1
    assert summary.calibration is not None
    return folder


def tensors(folder: Path) -> dict[str, Any]:
    return torch.load(folder / "checkpoints" / "state.pt", weights_only=True)


def test_a_run_that_is_taken_up_with_a_new_module_ends_with_the_same_bits(run: Path, tmp_path: Path) -> None:
    class Killed(Exception):
        pass

    def kill(event: Event) -> None:
        if isinstance(event, StepDone) and event.step == 35:
            raise Killed

    with pytest.raises(Killed):
        train(tmp_path / "again", tiny(), checkpoint_steps=20, listeners=[kill])
    summary = train(tmp_path / "again", tiny(1), resume=True, checkpoint_steps=20)
    assert summary.finished
    whole, resumed = tensors(run), tensors(tmp_path / "again")
    for part in ("model", "average"):
        assert whole[part].keys() == resumed[part].keys()
        for name, tensor in whole[part].items():
            assert torch.equal(tensor, resumed[part][name]), f"{part} {name}"
    assert (run / "model.safetensors").read_bytes() == (tmp_path / "again/model.safetensors").read_bytes()


def test_a_module_is_loaded_with_its_weights_and_answers_as_in_training(run: Path) -> None:
    classifier = vitral.load(run, model=tiny(1), device="cpu", precision="float32")
    summary = json.loads((run / "summary.json").read_text())
    config = json.loads((run / "config.json").read_text())
    assert config["architecture"] == {"module": "TinyNet"}
    assert classifier.temperature == config["temperature"] == summary["calibration"]["temperature"]
    judged = vitral.evaluate(classifier, "digits", split="val", workers=0)
    assert judged.top1 == summary["val_top1"]
    val = open_data("digits", val_fraction=0.2, seed=0).split("val")
    pictures = [np.asarray(val.images[row]) for row in range(5)]
    images = torch.stack([classifier.preprocess(picture) for picture in pictures])
    shares = (classifier.model(images) / classifier.temperature).softmax(1)
    for prediction, row in zip(classifier.predict(pictures, top=1), shares, strict=True):
        assert prediction.label == classifier.labels[int(row.argmax())]
        assert prediction.top[0][1] == pytest.approx(float(row.max().detach()))


def test_the_average_has_the_statistics_of_the_batch_norms(run: Path) -> None:
    state = tensors(run)
    mean = state["average"]["body.1.running_mean"]
    assert not torch.equal(mean, torch.zeros_like(mean))
    assert torch.equal(mean, state["model"]["body.1.running_mean"])


def test_without_the_module_there_is_one_line(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(VitralError, match=r"the module TinyNet of your own code.*model=TinyNet\("):
        vitral.load(run)
    monkeypatch.setattr(sys, "argv", ["vitral", "eval", str(run), "digits"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    told = capsys.readouterr().err
    assert ended.value.code == 1
    assert len(told.splitlines()) == 1
    assert "vitral.load(FOLDER, model=TinyNet(...))" in told


def test_only_our_models_give_features(run: Path) -> None:
    classifier = vitral.load(run, model=tiny(), device="cpu")
    with pytest.raises(VitralError, match="TinyNet gives logits alone"):
        classifier.features(np.zeros((8, 8, 3), np.uint8))
    with pytest.raises(VitralError, match="TinyNet gives logits alone"):
        vitral.probe(classifier, "digits")


def test_the_doctor_changes_the_images_of_a_module(run: Path) -> None:
    diagnosis = vitral.diagnose(vitral.load(run, model=tiny(), device="cpu"), "digits", limit=100)
    settings = {finding.setting for finding in diagnosis.findings}
    assert "mean/std" in settings
    assert "activation" not in settings


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"whiten": True}, "whiten=True is for Vitral's models, not for a TinyNet"),
        ({"trained": "lora"}, "trained=lora is for Vitral's"),
        ({"small_images": 0.5}, "small_images=0.5 is"),
        ({"layer_decay": 0.7}, "layer_decay=0.7 is"),
        ({"optimizer": "muon"}, "optimizer=muon does not know"),
        ({"img_size": None}, "img_size=32"),
        ({"model": TinyNet(classes=7)}, r"gives \(2, 7\) for 2 images, and not logits \(2, 10\)"),
        ({"model": nn.Linear(5, 10)}, "the module Linear cannot take images"),
        ({"model": TinyNet}, "model is the callable"),
        ({"model": "module:TinyNet"}, "is a module of your own code"),
    ],
)
def test_what_a_module_cannot_be_asked_is_refused_in_one_line(
    settings: dict[str, Any], line: str, tmp_path: Path
) -> None:
    with pytest.raises(VitralError, match=line) as raised:
        train(tmp_path / "run", settings.pop("model", tiny()), **settings)
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "run").exists()


def test_another_module_is_refused(run: Path, tmp_path: Path) -> None:
    with pytest.raises(VitralError, match="does not fit"):
        vitral.load(run, model=nn.Linear(5, 10))
    train(tmp_path / "run", tiny(), steps=2)
    with pytest.raises(VitralError, match="model cannot change"):
        train(tmp_path / "run", nn.Flatten(), steps=4, resume=True)
    with pytest.raises(VitralError, match="of your own code"):
        vitral.train("digits", tmp_path / "run", steps=4, resume=True)


def test_one_of_our_models_is_a_module_too_and_its_folder_needs_none(tmp_path: Path) -> None:
    model = vitral.create("ViT-Ti/4", img_size=8, num_classes=10, num_layers=1, embed_dim=32, num_heads=2)
    summary = train(tmp_path / "run", model, steps=2, img_size=None)
    assert vitral.evaluate(tmp_path / "run", "digits", split="val", workers=0).top1 == summary.val_top1
    other = vitral.create("ViT-Ti/4", img_size=8, num_classes=10, num_layers=1, embed_dim=32, num_heads=2)
    assert train(tmp_path / "run", other, steps=4, img_size=(8, 8), resume=True).steps == 4


def test_all_parts_are_passed_together_and_tied_weights_are_written(tmp_path: Path) -> None:
    class Tied(TinyNet):
        def __init__(self) -> None:
            super().__init__()
            self.also = self.body[0]

    seen = []

    def sgd(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        seen.extend((group["weight_decay"] > 0, sorted(group["names"])) for group in groups)
        return torch.optim.SGD(groups, lr=0.0)

    train(tmp_path / "run", Tied(), steps=2, optimizer=sgd)
    kept = ["body.0.bias", "body.1.bias", "body.1.weight", "body.4.bias", "body.5.bias", "body.5.weight"]
    assert seen == [
        (False, [*kept, "logits.bias"]),
        (True, ["body.0.weight", "body.4.weight", "logits.weight"]),
    ]
    assert vitral.load(tmp_path / "run", model=Tied()).predict(np.zeros((8, 8, 3), np.uint8))[0].error is None
