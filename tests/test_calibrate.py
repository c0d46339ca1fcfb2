"""Temperatures are those of hand-worked cases and of scikit-learn, and stay with the model that they suit."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tests.conftest import settled, write_images
from tests.test_resume import Crash, CrashAt
from vitral.checkpoints.convert import convert
from vitral.checkpoints.folder import Checkpoint, load_checkpoint, save_checkpoint
from vitral.cli.commands.info import _about
from vitral.data.image_data import open_data
from vitral.data.loader import Loader
from vitral.evaluation.calibration import LEAST_IMAGES, calibrate, fit_temperature
from vitral.evaluation.evaluate import evaluate_classifier
from vitral.images.picture import open_image
from vitral.images.preprocess import Preprocess
from vitral.inference.classifier import Classifier, load
from vitral.model.vit import VisionTransformer
from vitral.recipes.recipe import Recipe
from vitral.recipes.resolve import load_base, start
from vitral.runtime.errors import VitralError
from vitral.training.loop import train

LABELS = ("ant", "bee", "cat")


def overconfident(count: int, factor: float, classes: int = 5) -> tuple[Tensor, Tensor]:
    """Logits `factor` times too large for the labels, which are drawn from the right probabilities."""
    generator = torch.Generator().manual_seed(0)
    right_BL = 2 * torch.randn(count, classes, generator=generator)
    labels_B = torch.multinomial(right_BL.softmax(1), 1, generator=generator)[:, 0]
    return factor * right_BL, labels_B


# --- The number ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("right", [60, 80, 99, 100])
def test_two_classes_of_equal_confidence_by_hand(right: int) -> None:
    # Logits 0 and 3 everywhere: the probability at T is 1 / (1 + e^(-3/T)), and is to be the accuracy. With
    # an image's worth of doubt, (right + 1/2) of 101.
    logits_BL = torch.tensor([[0.0, 3.0]]).expand(100, 2)
    labels_B = (torch.arange(100) < right).long()
    accuracy = (right + 0.5) / 101
    assert fit_temperature(logits_BL, labels_B) == pytest.approx(
        3 / math.log(accuracy / (1 - accuracy)), rel=1e-5
    )


@pytest.mark.parametrize("factor", [0.5, 1.0, 3.0])
def test_the_factor_that_made_logits_too_large_is_found(factor: float) -> None:
    assert fit_temperature(*overconfident(20_000, factor)) == pytest.approx(factor, rel=0.03)


def test_probabilities_are_scikit_learns() -> None:
    pytest.importorskip("sklearn", minversion="1.8")  # the first with temperatures
    from sklearn.base import BaseEstimator, ClassifierMixin
    from sklearn.calibration import CalibratedClassifierCV
    from sklearn.frozen import FrozenEstimator

    class Given(ClassifierMixin, BaseEstimator):
        """A classifier whose inputs are its logits."""

        classes_ = np.arange(5)

        def fit(self, *_: Any) -> "Given":
            return self

        def decision_function(self, logits: np.ndarray) -> np.ndarray:
            return logits

        def predict(self, logits: np.ndarray) -> np.ndarray:
            return logits.argmax(1)

        def __sklearn_is_fitted__(self) -> bool:
            return True

    logits_BL, labels_B = overconfident(1000, 2.5)
    theirs = CalibratedClassifierCV(FrozenEstimator(Given()), method="temperature", ensemble=False)  # pyrefly: ignore
    theirs.fit(logits_BL.double().numpy(), labels_B.numpy())
    expected = theirs.predict_proba(logits_BL.double().numpy())
    found = (logits_BL / fit_temperature(logits_BL, labels_B)).softmax(1)
    # Apart by the one image's worth of doubt.
    assert found.numpy() == pytest.approx(expected, abs=2e-3)


def test_it_lowers_the_calibration_error_and_says_so() -> None:
    calibration = calibrate(*overconfident(2000, 3.0))
    assert calibration is not None
    assert calibration.n == 2000
    assert calibration.raw_ece > 0.1
    assert calibration.ece < 0.03


def test_few_images_leave_probabilities_as_they_are() -> None:
    logits_BL, labels_B = overconfident(LEAST_IMAGES, 3.0)
    assert calibrate(logits_BL, labels_B) is not None
    assert calibrate(logits_BL[1:], labels_B[1:]) is None


@pytest.mark.parametrize("logits_BL", [torch.zeros(0, 2), torch.tensor([[0.0, math.inf]])])
def test_nothing_to_fit_on_is_said(logits_BL: Tensor) -> None:
    with pytest.raises(VitralError, match="finite logits of some images"):
        fit_temperature(logits_BL, torch.zeros(len(logits_BL), dtype=torch.long))


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """So few images are read before a process to load them has started."""
    monkeypatch.setattr("vitral.data.workers.cpu_count", lambda: 0)


# --- In a model folder ---------------------------------------------------------------------------------


def a_model(classes: int = 3) -> VisionTransformer:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = VisionTransformer(
            16, 8, embed_dim=16, num_layers=2, num_heads=2, num_classes=classes, dropout=0.0
        )
        model.state_dict()["head.weight"].normal_(std=2)
        model.state_dict()["head.bias"].normal_()
    return model.eval()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_checkpoint(tmp_path / "model", Checkpoint(a_model(), Preprocess((16, 16)), LABELS, {}, 1.7))
    return tmp_path / "model"


def on_cpu(folder: Path, **options: Any) -> Classifier:
    return load(folder, device="cpu", precision="float32", **options)


def test_the_folder_keeps_it(folder: Path) -> None:
    assert load_checkpoint(folder).temperature == 1.7
    assert load_checkpoint(folder, img_size=24).temperature == 1.7
    # A fresh head has none.
    assert load_checkpoint(folder, num_classes=3).temperature == 1
    assert "softmax(logits / 1.700)" in _about("model", load_checkpoint(folder))


def rewritten(folder: Path, **changes: Any) -> Path:
    file = folder / "config.json"
    config = {**json.loads(file.read_text()), **changes}
    file.write_text(json.dumps({name: value for name, value in config.items() if value is not None}))
    return folder


def test_a_folder_of_an_earlier_version_has_none(folder: Path) -> None:
    assert load_checkpoint(rewritten(folder, temperature=None)).temperature == 1
    assert "probabilities: softmax(logits)" in _about("model", load_checkpoint(folder))


@pytest.mark.parametrize("value", [0, -1, math.inf, math.nan, True, "1.5", [1.5]])
def test_what_is_no_temperature_is_refused(value: Any, folder: Path) -> None:
    with pytest.raises(
        VitralError, match=r"config\.json .*(temperature .* from 1e-6 to 1e6|is not a number)"
    ):
        load_checkpoint(rewritten(folder, temperature=value))


def test_predictions_are_at_the_temperature_and_logits_raw(folder: Path, image_folder: Path) -> None:
    image = next(image_folder.rglob("*.png"))
    pixels = load_checkpoint(folder).preprocess(image)[None]
    with torch.no_grad():
        raw_L = a_model()(pixels)[0]
    classifier = on_cpu(folder)
    assert torch.allclose(classifier.logits(image), raw_L[None], atol=1e-5)
    (prediction,) = classifier.predict(image)
    expected = {name: float(value) for name, value in zip(LABELS, (raw_L / 1.7).softmax(0), strict=True)}
    assert dict(prediction.top) == pytest.approx(expected, abs=1e-6)


def test_evaluation_is_at_the_temperature(folder: Path, image_folder: Path) -> None:
    images = sorted(image_folder.rglob("*.png"))
    labels_B = torch.tensor([LABELS.index(path.parent.name) for path in images])
    logits_BL = on_cpu(folder).logits(images)
    _, evaluation = evaluate_classifier(on_cpu(folder), str(image_folder), split="all")
    assert evaluation.loss == pytest.approx(float(F.cross_entropy(logits_BL / 1.7, labels_B)), abs=1e-5)
    assert evaluation.loss != pytest.approx(float(F.cross_entropy(logits_BL, labels_B)), abs=1e-2)


@pytest.mark.parametrize("to", ["timm", "transformers", "torchvision", "google"])
def test_another_layout_has_it_in_its_head(to: str, folder: Path, tmp_path: Path) -> None:
    certificate = convert(str(folder), tmp_path / "out", to, num_heads=2)
    assert certificate.temperature == 1.7
    file = {"google": "model.npz", "torchvision": "model.pth"}.get(to, "")
    written = load_checkpoint(tmp_path / "out" / file, **({"num_heads": 2} if file else {}))
    assert written.temperature == 1
    images = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected_BL = (a_model()(images) / 1.7).softmax(1)
        assert torch.allclose(written.model(images).softmax(1), expected_BL, atol=1e-5)


def test_ours_keeps_it_beside_the_head(folder: Path, tmp_path: Path) -> None:
    convert(str(folder), tmp_path / "out", "vitral")
    again = load_checkpoint(tmp_path / "out")
    assert again.temperature == 1.7
    ours, theirs = a_model().state_dict(), again.model.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


# --- After training ------------------------------------------------------------------------------------


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """120 images to validate on, so that a run is calibrated, and 30 to test on."""
    for name, count in (("train", 16), ("val", 40), ("test", 10)):
        write_images(tmp_path / "data" / name, dict.fromkeys(LABELS, count), size=(16, 16), seed=count)
    return tmp_path / "data"


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    save_checkpoint(tmp_path / "base", Checkpoint(a_model(), Preprocess((16, 16)), LABELS, {}, 5.0))
    return Recipe(
        model=str(tmp_path / "base"), steps=6, batch_size=8, workers=0, device="cpu", precision="float32"
    )


def test_a_run_ends_calibrated_on_its_validation_images(data: Path, recipe: Recipe, tmp_path: Path) -> None:
    summary = train(open_data(str(data)), tmp_path / "run", recipe)
    classifier = on_cpu(tmp_path / "run")
    val = open_data(str(data)).split("val")
    # By another route: the images one at a time, and the temperature among many.
    logits_BL = torch.cat([classifier.logits(open_image(image)) for image in val.images])
    labels_B = torch.from_numpy(val.labels)
    tried = {
        t: float(F.cross_entropy(logits_BL / t, labels_B, label_smoothing=1 / 121))
        for t in np.geomspace(0.05, 20, 2001)
    }
    assert classifier.temperature == pytest.approx(min(tried, key=lambda t: tried[t]), rel=4e-3)
    assert classifier.temperature != 1
    assert summary.calibration is not None
    assert summary.calibration["temperature"] == classifier.temperature
    # The look at the test split is at the temperature.
    _, evaluation = evaluate_classifier(classifier, str(data))
    assert summary.test is not None
    assert (summary.test["loss"], summary.test["ece"]) == pytest.approx(
        (evaluation.loss, evaluation.ece), abs=1e-4
    )


def test_a_run_with_few_validation_images_is_left_alone(
    image_folder: Path, recipe: Recipe, tmp_path: Path
) -> None:
    summary = train(open_data(str(image_folder)), tmp_path / "run", recipe)
    assert summary.calibration is None
    assert load_checkpoint(tmp_path / "run").temperature == 1


def test_fine_tuning_starts_again_at_one(data: Path, recipe: Recipe) -> None:
    assert load_checkpoint(recipe.get("model")).temperature == 5
    resolved = settled(open_data(str(data)), recipe)
    assert start(resolved, LABELS, load_base(recipe)).temperature == 1


def test_a_resumed_run_ends_at_the_same_temperature(data: Path, recipe: Recipe, tmp_path: Path) -> None:
    recipe = recipe.changed(checkpoint_steps=2)
    train(open_data(str(data)), tmp_path / "whole", recipe)
    with pytest.raises(Crash):
        train(open_data(str(data)), tmp_path / "cut", recipe, listeners=[CrashAt(5)])
    train(open_data(str(data)), tmp_path / "cut", recipe, resume=True)
    for file in ("config.json", "model.safetensors"):
        assert (tmp_path / "whole" / file).read_bytes() == (tmp_path / "cut" / file).read_bytes()


# --- Test-time augmentation ------------------------------------------------------------------------------


def test_flip_is_the_mean_of_an_image_and_its_mirror(folder: Path, image_folder: Path) -> None:
    image = next(image_folder.rglob("*.png"))
    pixels = load_checkpoint(folder).preprocess(image)
    mirrored = torch.from_numpy(np.ascontiguousarray(pixels.numpy()[:, :, ::-1]))
    with torch.no_grad():
        both_L = [(a_model()(view[None])[0] / 1.7).softmax(0) for view in (pixels, mirrored)]
    expected = {name: float(value) for name, value in zip(LABELS, (both_L[0] + both_L[1]) / 2, strict=True)}
    (prediction,) = on_cpu(folder, tta="flip").predict(image)
    assert dict(prediction.top) == pytest.approx(expected, abs=1e-6)
    (plain,) = on_cpu(folder).predict(image)
    assert dict(plain.top) != pytest.approx(expected, abs=1e-3)


def test_evaluation_averages_too(folder: Path, image_folder: Path) -> None:
    classifier = on_cpu(folder, tta="flip")
    split = open_data(str(image_folder), val_fraction=0).split("train")
    names = [prediction.top for prediction in classifier.predict([open_image(i) for i in split.images])]
    losses = [-math.log(dict(top)[LABELS[label]]) for top, label in zip(names, split.labels, strict=True)]
    _, evaluation = evaluate_classifier(classifier, str(image_folder), split="all")
    assert evaluation.loss == pytest.approx(np.mean(losses), abs=1e-5)
    _, plain = evaluate_classifier(on_cpu(folder), str(image_folder), split="all")
    assert plain.loss != pytest.approx(evaluation.loss, abs=1e-3)


def test_a_mirrored_batch_has_the_same_answer(folder: Path, image_folder: Path) -> None:
    classifier = on_cpu(folder, tta="flip")
    split = open_data(str(image_folder)).split("val")
    (batch,) = Loader(split, classifier.preprocess).evaluation_batches(50)
    one, other = (classifier.log_probabilities(images) for images in (batch.images, batch.images.flip(3)))
    assert torch.allclose(one, other, atol=1e-6)
    assert torch.allclose(one.exp().sum(1), torch.ones(len(batch.labels)))


def test_another_augmentation_is_refused(folder: Path) -> None:
    with pytest.raises(VitralError, match="tta=crops: it must be one of none, flip"):
        on_cpu(folder, tta="crops")
