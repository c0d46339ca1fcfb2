"""Torch Datasets of (image, label) as data, against the same images in a folder."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import ConcatDataset, Dataset, IterableDataset, Subset, TensorDataset
from torchvision.datasets import ImageFolder

from tests.conftest import write_images
from tests.test_resume import Crash, CrashAt
from vitral.data.contents import Contents
from vitral.data.image_data import ImageData, open_data
from vitral.evaluation.evaluate import evaluate_classifier
from vitral.images.picture import open_image
from vitral.inference.classifier import load
from vitral.recipes.recipe import Recipe
from vitral.runtime.errors import VitralError
from vitral.training.loop import train


class Pictures(Dataset):
    """Noise of 6x9 pixels, in a form of its own; counts how often an item is asked for."""

    def __init__(self, labels: Sequence[Any], form: str = "pil", **attributes: Any) -> None:
        self.pixels = np.random.default_rng(0).integers(0, 256, (len(labels), 6, 9, 3), dtype=np.uint8)
        self.given, self.form, self.asked = labels, form, 0
        vars(self).update(attributes)

    def __len__(self) -> int:
        return len(self.given)

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        self.asked += 1
        pixels = self.pixels[index]
        forms = {
            "pil": lambda: Image.fromarray(pixels),
            "array (H, W, C)": lambda: pixels,
            "array (C, H, W)": lambda: np.moveaxis(pixels, -1, 0),
            "tensor (C, H, W)": lambda: torch.from_numpy(pixels).permute(2, 0, 1),
            "tensor (H, W, C)": lambda: torch.from_numpy(pixels),
            "grey (H, W)": lambda: pixels[..., 0],
            "floats (C, H, W)": lambda: torch.from_numpy(pixels).permute(2, 0, 1) / 255,
        }
        return forms[self.form](), self.given[index]


def opened(dataset: Dataset, **options: Any) -> ImageData:
    return open_data(dataset, val_fraction=0, **options)


# --- Images ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "form", ["pil", "array (H, W, C)", "array (C, H, W)", "tensor (C, H, W)", "tensor (H, W, C)"]
)
def test_an_image_of_any_form_has_its_pixels(form: str) -> None:
    dataset = Pictures([0, 1, 0], form)
    split = opened(dataset).split("train")
    for row in range(3):
        assert np.array_equal(np.asarray(open_image(split.images[row])), dataset.pixels[row])
    assert split.typical_sizes.tolist() == [[6, 9]] * 3


def test_grey_arrays_and_floats_are_pictures_too() -> None:
    grey = opened(Pictures([0, 1], "grey (H, W)")).split("train")
    expected = np.repeat(Pictures([0, 1]).pixels[1, :, :, :1], 3, -1)
    assert np.array_equal(np.asarray(open_image(grey.images[1])), expected)
    floats = opened(Pictures([0, 1], "floats (C, H, W)")).split("train")
    assert np.array_equal(np.asarray(open_image(floats.images[1])), Pictures([0, 1]).pixels[1])


# --- Labels ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("labels", "attributes", "classes", "indices"),
    [
        ([1, 0, 1], {"classes": ["dog", "ant"]}, ("dog", "ant"), [1, 0, 1]),
        (["dog", "ant", "dog"], {}, ("ant", "dog"), [1, 0, 1]),
        (["dog", "ant", "dog"], {"classes": ["dog", "ant"]}, ("dog", "ant"), [0, 1, 0]),
        ([10, 2, 10], {}, ("2", "10"), [1, 0, 1]),
        ([torch.tensor(1), np.int64(0), 1], {}, ("0", "1"), [1, 0, 1]),
    ],
    ids=str,
)
def test_labels_are_numbers_or_names(
    labels: list[Any], attributes: dict[str, Any], classes: tuple[str, ...], indices: list[int]
) -> None:
    found = opened(Pictures(labels, **attributes))
    assert found.classes == classes
    assert found.split("train").labels.tolist() == indices
    assert not found.multi_label


def test_vectors_of_0_and_1_are_several_labels() -> None:
    vectors = [torch.tensor([1, 0, 1]), torch.tensor([0, 1, 0])]
    found = ImageData.from_dataset(Pictures(vectors), classes=["a", "b", "c"], val_fraction=0)
    assert found.multi_label
    assert found.split("train").labels.tolist() == [[True, False, True], [False, True, False]]


def test_classes_may_be_named_beside_the_dataset() -> None:
    found = ImageData.from_dataset(Pictures([0, 1, 0]), classes=["ant", "bee"], val_fraction=0)
    assert found.classes == ("ant", "bee")


def test_labels_that_the_dataset_lists_are_taken_without_asking_for_each_image() -> None:
    labels = [0, 1] * 200
    dataset = Pictures(labels, targets=labels)
    assert opened(dataset).split("train").labels.tolist() == labels
    assert dataset.asked < 20


@pytest.mark.parametrize("listed", [[1, 0] * 20, [0, 1] * 3, ["x"] * 40], ids=["others", "too few", "names"])
def test_a_list_that_is_not_what_the_items_say_is_not_believed(listed: list[Any]) -> None:
    labels = [0, 1] * 20
    assert opened(Pictures(labels, targets=listed)).split("train").labels.tolist() == labels


def test_subsets_and_concatenations_keep_labels_and_classes() -> None:
    labels = [0, 1, 1, 0, 1, 0]
    whole = Pictures(labels, targets=torch.tensor(labels), classes=["ant", "bee"])
    found = opened(ConcatDataset([Subset(whole, [2, 3]), Subset(whole, [0, 4])]))
    assert found.classes == ("ant", "bee")
    assert found.split("train").labels.tolist() == [1, 0, 0, 1]


# --- Splits and runs ---------------------------------------------------------------------------------


def test_images_are_held_out_by_class_unless_a_validation_set_is_given() -> None:
    found = open_data(Pictures([0, 1] * 10))
    assert found.held_out
    assert {name: np.bincount(split.labels).tolist() for name, split in found.splits.items()} == {
        "train": [8, 8],
        "val": [2, 2],
    }
    given = ImageData.from_dataset(Pictures([0, 1] * 10), Pictures([1, 0]))
    assert not given.held_out
    assert given.split("val").labels.tolist() == [1, 0]


def test_what_was_opened_can_be_divided_anew() -> None:
    found = open_data(Pictures([0, 1] * 10), seed=1)
    assert open_data(found, seed=1).split("val").names == found.split("val").names
    assert open_data(found, seed=2).split("val").names != found.split("val").names
    assert len(open_data(found, val_fraction=0).split("train")) == 20


def test_a_run_on_a_dataset_ends_with_the_same_bits_with_workers_and_taken_up_again(tmp_path: Path) -> None:
    dataset = ImageFolder(str(write_images(tmp_path / "images", {"ant": 12, "bee": 12}, size=(70, 70))))
    data = open_data(dataset, val_fraction=0.25, seed=3)
    recipe = Recipe(model="ViT-Pico/8", epochs=2, batch_size=4, img_size=72, workers=0, device="cpu")
    train(data, tmp_path / "whole", recipe)
    train(data, tmp_path / "workers", recipe.changed(workers=2))
    with pytest.raises(Crash):
        train(data, tmp_path / "parts", recipe.changed(checkpoint_steps=2), listeners=[CrashAt(5)])
    train(open_data(dataset, val_fraction=0.25, seed=3), tmp_path / "parts", Recipe(), resume=True)
    weights = [
        (tmp_path / name / "last" / "model.safetensors").read_bytes()
        for name in ("whole", "workers", "parts")
    ]
    assert weights[1:] == weights[:1] * 2
    classifier = load(tmp_path / "whole")
    _, evaluation = evaluate_classifier(classifier, dataset, split="all")  # type: ignore[arg-type]
    assert evaluation.n == 24


def test_what_a_dataset_holds_is_known_by_its_pixels() -> None:
    dataset = Pictures([0, 1] * 10)
    before = Contents.of(open_data(dataset))
    assert Contents.of(open_data(dataset)) == before
    dataset.pixels[3] ^= 255
    assert Contents.of(open_data(dataset)) != before


# --- What is refused ---------------------------------------------------------------------------------


class Stream(IterableDataset):
    def __iter__(self) -> Any:
        yield Image.new("RGB", (3, 2)), 0


@pytest.mark.parametrize(
    ("dataset", "text"),
    [
        (Stream(), "the train dataset, a Stream, has no length"),
        (TensorDataset(torch.zeros(2, 3)), r"gives \(Tensor\); give \(image, label\)"),
        (Pictures([]), "Pictures holds no images"),
        (Pictures([0, 0]), "Pictures has one class only, '0'"),
        (Pictures([0, "bee"]), "the labels are numbers and names"),
        (Pictures([0.5, 1.0]), r"the labels are 0\.5"),
        (Pictures([0, 2], classes=["ant", "bee"]), "'train' has labels that the classes lack: 2"),
        (Pictures([(0, 1), (2, 0)]), "'train' has label vectors that are not 2 numbers 0 or 1"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_dataset_that_cannot_be_used_says_why(dataset: Dataset, text: str) -> None:
    with pytest.raises(VitralError, match=text):
        opened(dataset)


def test_data_of_no_kind_that_is_known_says_what_may_be_given() -> None:
    with pytest.raises(VitralError, match="data is a list; give an image folder"):
        open_data([1, 2])  # type: ignore[arg-type]  # pyrefly: ignore[bad-argument-type]


def test_a_path_is_a_source_too(image_folder: Path) -> None:
    assert open_data(image_folder).classes == open_data(str(image_folder)).classes
