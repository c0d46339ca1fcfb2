"""A classifier says what preprocessing, model and softmax say, whatever an image comes as."""

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from vitral.checkpoints.folder import Checkpoint, load_checkpoint, save_checkpoint
from vitral.images.preprocess import Preprocess
from vitral.inference.classifier import Classifier, as_classifier, load
from vitral.model.vit import VisionTransformer
from vitral.runtime.devices import Placement
from vitral.runtime.errors import ImageError, VitralError

LABELS = ("ant", "bee", "cat", "dog", "elk", "fox", "gnu")
CPU = Placement.choose("cpu", "float32")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model of seven labels whose answers differ from image to image."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = VisionTransformer((12, 20), 4, embed_dim=16, num_layers=2, num_heads=2, num_classes=7)
        model.state_dict()["head.weight"].normal_()
    save_checkpoint(tmp_path / "model", Checkpoint(model, Preprocess((12, 20)), LABELS, {"seed": 5}))
    return tmp_path / "model"


@pytest.fixture
def classifier(folder: Path) -> Classifier:
    return load(folder, device="cpu", precision="float32")


def picture(seed: int = 0) -> Image.Image:
    """A smooth random image, 23 high and 31 wide."""
    pixels = np.random.default_rng(seed).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((31, 23))


def pictures(count: int) -> list[Image.Image]:
    return [picture(seed) for seed in range(count)]


def png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    """Eight image files, the third of them damaged."""
    paths = [tmp_path / f"{number}.png" for number in range(8)]
    for number, path in enumerate(paths):
        path.write_bytes(png(picture(number)))
    paths[2].write_bytes(b"no picture")
    return [str(path) for path in paths]


def by_hand(folder: Path, image: Any) -> list[tuple[str, float]]:
    """Every label with its probability, likeliest first."""
    checkpoint = load_checkpoint(folder)
    with torch.no_grad():
        logits_L = checkpoint.model(checkpoint.preprocess(image)[None])[0].double().numpy()
    exponentials = np.exp(logits_L - logits_L.max())
    probabilities = exponentials / exponentials.sum()
    return [(LABELS[index], probabilities[index]) for index in np.argsort(-probabilities)]


def assert_same_answer(found: tuple[tuple[str, float], ...], expected: list[tuple[str, float]]) -> None:
    assert [label for label, _ in found] == [label for label, _ in expected]
    assert [value for _, value in found] == pytest.approx([value for _, value in expected], abs=1e-5)


# --- Kinds of images -----------------------------------------------------------------------------


def test_a_prediction_is_the_softmax_of_the_model(folder: Path, classifier: Classifier) -> None:
    (prediction,) = classifier.predict(picture(), top=7)
    assert_same_answer(prediction.top, by_hand(folder, picture()))
    assert sum(value for _, value in prediction.top) == pytest.approx(1)
    assert prediction.label == prediction.top[0][0]


def as_kind(kind: str, image: Image.Image, folder: Path) -> Any:
    array = np.asarray(image)
    if kind in ("path", "text"):
        (folder / "image.png").write_bytes(png(image))
    return {
        "path": folder / "image.png",
        "text": str(folder / "image.png"),
        "bytes": png(image),
        "picture": image,
        "array": array,
        "float array": array / 255,
        "tensor": torch.tensor(array).permute(2, 0, 1),
        "float tensor": torch.tensor(array).permute(2, 0, 1) / 255,
    }[kind]


KINDS = ["path", "text", "bytes", "picture", "array", "float array", "tensor", "float tensor"]


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_image_gives_the_same_answer(kind: str, classifier: Classifier, tmp_path: Path) -> None:
    (expected,) = classifier.predict(picture())
    (found,) = classifier.predict(as_kind(kind, picture(), tmp_path))
    assert found.top == expected.top


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_may_stand_in_a_list(kind: str, classifier: Classifier, tmp_path: Path) -> None:
    (expected,) = classifier.predict(picture())
    (found,) = classifier.predict([as_kind(kind, picture(), tmp_path)])
    assert found.top == expected.top


def stacked_arrays(images: list[Image.Image]) -> np.ndarray:
    return np.stack([np.asarray(image) for image in images])


def stacked_tensors(images: list[Image.Image]) -> Tensor:
    return torch.tensor(stacked_arrays(images)).permute(0, 3, 1, 2)


@pytest.mark.parametrize("collect", [tuple, iter, stacked_arrays, stacked_tensors])
def test_every_kind_of_collection_gives_the_same_answers(collect: Any, classifier: Classifier) -> None:
    expected = [prediction.top for prediction in classifier.predict(pictures(5))]
    assert [prediction.top for prediction in classifier.predict(collect(pictures(5)))] == expected


def test_no_images_give_no_predictions(classifier: Classifier) -> None:
    assert classifier.predict([]) == []


# --- Order, names and damage ---------------------------------------------------------------------


def test_answers_come_in_the_order_of_the_images(folder: Path, classifier: Classifier) -> None:
    found = classifier.predict(pictures(11), batch_size=3, top=7)
    for number, prediction in enumerate(found):
        assert prediction.image == f"image {number}"
        assert_same_answer(prediction.top, by_hand(folder, picture(number)))


def test_files_keep_their_names(classifier: Classifier, files: list[str]) -> None:
    assert [prediction.image for prediction in classifier.predict(files, batch_size=3)] == files


@pytest.mark.parametrize("batch_size", [1, 3, 32])
def test_a_damaged_image_gives_its_error_and_the_others_their_labels(
    batch_size: int, folder: Path, classifier: Classifier, files: list[str]
) -> None:
    found = classifier.predict(files, batch_size=batch_size, top=7)
    assert str(found[2].error).startswith("not an image, or of a format that Vitral does not read (JPEG")
    assert found[2].top == ()
    for number in (0, 1, 3, 4, 5, 6, 7):
        assert found[number].error is None
        assert_same_answer(found[number].top, by_hand(folder, picture(number)))


def test_a_missing_file_is_named(classifier: Classifier) -> None:
    (prediction,) = classifier.predict("nowhere.png")
    assert prediction.error == "there is no file nowhere.png"


def test_a_damaged_image_has_no_label(classifier: Classifier) -> None:
    (prediction,) = classifier.predict(b"no picture")
    with pytest.raises(VitralError, match="image 0 has no label: not an image"):
        _ = prediction.label


def test_the_size_of_batches_changes_nothing(classifier: Classifier) -> None:
    alone, together = (classifier.predict(pictures(9), batch_size=size, top=7) for size in (1, 9))
    for one, other in zip(alone, together, strict=True):
        assert_same_answer(one.top, list(other.top))


def test_images_are_read_as_they_are_needed(classifier: Classifier) -> None:
    read = 0

    def endless() -> Iterator[Image.Image]:
        nonlocal read
        while True:
            read += 1
            yield picture()

    next(classifier.predictions(endless(), batch_size=4))
    # The batch that was answered, and the one that is being read meanwhile.
    assert read == 8


# --- How many labels -----------------------------------------------------------------------------


@pytest.mark.parametrize(("top", "count"), [(1, 1), (3, 3), (7, 7), (100, 7)])
def test_as_many_labels_as_asked_for_or_all(top: int, count: int, classifier: Classifier) -> None:
    (prediction,) = classifier.predict(picture(), top=top)
    assert len(prediction.top) == count


def test_a_model_without_labels_predicts_none(folder: Path) -> None:
    with pytest.raises(VitralError, match="this model has no labels to predict; train it, or ask for feat"):
        load(folder, num_classes=3).predict(picture())


# --- Features ------------------------------------------------------------------------------------


@pytest.mark.parametrize("pooling", ["class", "mean"])
def test_features_are_the_models(pooling: Any) -> None:
    model = VisionTransformer(12, 4, embed_dim=16, num_layers=3, num_heads=2, num_classes=0, pooling=pooling)
    classifier = as_classifier(Checkpoint(model, Preprocess((12, 12)), ()), CPU)
    found = classifier.features(pictures(5), layers=(0, -1), batch_size=2)
    with torch.no_grad():
        images_BCHW = torch.stack([classifier.preprocess(image) for image in pictures(5)])
        expected = model.features(images_BCHW, layers=(0, -1))
    assert found.grid == expected.grid == (3, 3)
    torch.testing.assert_close(found.class_token, expected.class_token)
    torch.testing.assert_close(found.patch_tokens, expected.patch_tokens)
    torch.testing.assert_close(found.layers, expected.layers)


def test_one_image_has_features_too(classifier: Classifier) -> None:
    assert classifier.features(picture()).patch_tokens.shape == (1, 15, 16)


def test_an_image_that_cannot_be_read_has_no_features(classifier: Classifier, files: list[str]) -> None:
    with pytest.raises(ImageError, match=r"2\.png: not an image"):
        classifier.features(files)


def test_no_images_have_no_features(classifier: Classifier) -> None:
    with pytest.raises(VitralError, match="no images were given"):
        classifier.features([])


# --- Loading -------------------------------------------------------------------------------------


def test_a_loaded_classifier_is_ready_to_use(folder: Path, classifier: Classifier) -> None:
    assert not classifier.model.training
    assert classifier.labels == LABELS
    assert classifier.metadata == {"seed": 5}
    assert load(str(folder)).labels == LABELS


def test_another_size_reaches_preprocessing_and_model(folder: Path) -> None:
    larger = load(folder, img_size=(24, 16), precision="float32")
    assert larger.preprocess.img_size == (24, 16)
    assert larger.features(picture()).grid == (6, 4)


def test_another_number_of_classes_is_a_head_to_train(folder: Path) -> None:
    classifier = load(folder, num_classes=3)
    assert classifier.model.state_dict()["head.weight"].shape == (3, 16)
    assert classifier.labels == ()


def test_bfloat16_says_nearly_the_same(folder: Path, classifier: Classifier) -> None:
    (exact,) = classifier.predict(picture(), top=1)
    (rounded,) = load(folder, device="cpu", precision="bfloat16").predict(picture(), top=1)
    assert rounded.label == exact.label
    assert rounded.top[0][1] == pytest.approx(exact.top[0][1], abs=0.05)
