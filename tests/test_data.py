"""Folders, digits and parquet files against what was written into them; splits and batches by counting."""

import io
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits
from torchvision.transforms.v2.functional import pil_to_tensor

from vitral.data.batches import Batch, DamageCount
from vitral.data.image_data import ImageData, open_data
from vitral.data.loader import Loader
from vitral.data.randomness import Sampling, seeded
from vitral.data.sources import find_images
from vitral.data.split import Split, image_sizes
from vitral.data.workers import Loading
from vitral.images.picture import open_image
from vitral.runtime.errors import ImageError, VitralError


def png(grey: int = 0, size: tuple[int, int] = (3, 2)) -> bytes:
    file = io.BytesIO()
    Image.new("L", size, grey).save(file, "PNG")
    return file.getvalue()


def lay(root: Path, *names: str) -> str:
    """Writes an image at each name, and gives the root as DATA is given."""
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png())
    return str(root)


def numbered(folder: str, count: int) -> list[str]:
    return [f"{folder}/{number:03}.png" for number in range(count)]


def names(found: ImageData) -> dict[str, list[str]]:
    return {name: sorted(split.names) for name, split in found.splits.items()}


# --- Folders ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("train", ["train", "training"])
@pytest.mark.parametrize("val", ["val", "valid", "validation"])
def test_train_and_val_folders_by_each_spelling(tmp_path: Path, train: str, val: str) -> None:
    found = open_data(
        lay(tmp_path, f"{train}/ant/1.png", f"{train}/bee/2.png", f"{val}/ant/3.png", f"{val}/bee/4.png")
    )
    assert found.classes == ("ant", "bee")
    assert names(found) == {
        "train": [f"{train}/ant/1.png", f"{train}/bee/2.png"],
        "val": [f"{val}/ant/3.png", f"{val}/bee/4.png"],
    }
    assert not found.held_out


def test_labels_are_the_folders_in_order(tmp_path: Path) -> None:
    found = open_data(lay(tmp_path, "bee/1.png", "ant/2.png", "cat/3.png", "ant/4.png"), val_fraction=0)
    split = found.split("train")
    assert [found.classes[label] for label in split.labels] == [name.split("/")[0] for name in split.names]
    assert [split.images[i] for i in range(4)] == [tmp_path / name for name in split.names]


def test_nested_folders_belong_to_their_class(tmp_path: Path) -> None:
    found = open_data(lay(tmp_path, "ant/red/big/1.png", "ant/2.png", "bee/3.png"), val_fraction=0)
    assert names(found) == {"train": ["ant/2.png", "ant/red/big/1.png", "bee/3.png"]}
    assert found.classes == ("ant", "bee")


def test_upper_case_suffixes_count(tmp_path: Path) -> None:
    found = open_data(lay(tmp_path, "ant/1.JPG", "ant/2.Png", "bee/3.JPEG"), val_fraction=0)
    assert len(found.split("train")) == 3


@pytest.mark.parametrize(
    "stray", ["ant/.hidden.png", "ant/.thumbnails/1.png", ".git/1.png", "ant/notes.txt", "loose.png"]
)
def test_hidden_and_other_files_are_passed_over(tmp_path: Path, stray: str) -> None:
    found = open_data(lay(tmp_path, "ant/1.png", "bee/2.png", stray), val_fraction=0)
    assert found.classes == ("ant", "bee")
    assert names(found) == {"train": ["ant/1.png", "bee/2.png"]}


def test_a_class_called_test_is_a_class_in_an_unsplit_folder(tmp_path: Path) -> None:
    found = open_data(lay(tmp_path, *numbered("exam", 3), *numbered("test", 3)))
    assert found.classes == ("exam", "test")
    assert list(found.splits) == ["train", "val"]


def test_what_was_found_is_described(tmp_path: Path) -> None:
    found = open_data(lay(tmp_path, *numbered("ant", 10), *numbered("bee", 20)), val_fraction=0.2)
    first, second, third, doubles = found.describe().splitlines()
    assert first == f"{tmp_path}: 30 images in 2 classes (ant, bee)"
    assert second == "splits: train 24, val 6, val taken from each class and not trained on"
    assert third == "        training images per class: 8 to 16; typical size 2x3"
    assert doubles.startswith("6 of the val images are in train too, such as ant/")


# --- Digits ----------------------------------------------------------------------------------------


def test_digits_are_those_of_scikit_learn() -> None:
    found = open_data("digits", val_fraction=0)
    ink, labels = load_digits(return_X_y=True)
    split = found.split("train")
    assert found.classes == tuple("0123456789")
    np.testing.assert_array_equal(split.labels, labels)
    # 16 is full ink, 8 the middle.
    np.testing.assert_allclose(
        np.asarray(split.images[7], float).ravel() / 255, np.asarray(ink)[7] / 16, atol=1 / 255
    )


def test_digits_are_not_to_be_mirrored_and_photographs_are(image_folder: Path) -> None:
    assert not open_data("digits").mirror_safe
    assert open_data(str(image_folder)).mirror_safe


# --- Parquet ---------------------------------------------------------------------------------------


def write_parquet(path: Path, labels: Sequence[Any], classes: Sequence[str] = ()) -> str:
    """The Hugging Face layout; the image of row i is of grey i."""
    images = [{"bytes": png(grey), "path": f"{grey}.png"} for grey in range(len(labels))]
    table = pa.table({"image": images, "label": labels})
    if classes:
        features = {"image": {"_type": "Image"}, "label": {"_type": "ClassLabel", "names": list(classes)}}
        info = json.dumps({"info": {"features": features}})
        table = table.replace_schema_metadata({"huggingface": info})
    pq.write_table(table, path)
    return str(path)


def grey(split: Split, index: int) -> int:
    colour = open_image(split.images[index]).getpixel((0, 0))
    assert isinstance(colour, tuple)
    return int(colour[0])


def test_hugging_face_names_its_classes(tmp_path: Path) -> None:
    source = write_parquet(tmp_path / "a.parquet", [1, 0, 1], classes=["dog", "ant"])
    found = open_data(source, val_fraction=0)
    split = found.split("train")
    assert found.classes == ("dog", "ant")
    assert split.labels.tolist() == [1, 0, 1]
    assert [grey(split, row) for row in range(3)] == [0, 1, 2]
    assert list(split.names) == ["train row 0", "train row 1", "train row 2"]


@pytest.mark.parametrize(
    ("labels", "classes", "indices"),
    [
        (["dog", "ant", "dog"], ("ant", "dog"), [1, 0, 1]),
        ([10, 2, 10], ("2", "10"), [1, 0, 1]),
        ([1, 2, 3], ("1", "2", "3"), [0, 1, 2]),
        ([0, 1, 0], ("0", "1"), [0, 1, 0]),
    ],
)
def test_without_metadata_the_labels_are_the_classes(
    tmp_path: Path, labels: list, classes: tuple[str, ...], indices: list[int]
) -> None:
    found = open_data(write_parquet(tmp_path / "a.parquet", labels), val_fraction=0)
    assert found.classes == classes
    assert found.split("train").labels.tolist() == indices


def test_text_labels_may_stand_beside_metadata(tmp_path: Path) -> None:
    source = write_parquet(tmp_path / "a.parquet", ["ant", "dog"], classes=["dog", "ant"])
    assert open_data(source, val_fraction=0).split("train").labels.tolist() == [1, 0]


@pytest.mark.parametrize(("file", "split"), [("validation", "val"), ("val", "val"), ("test", "test")])
def test_split_in_the_pattern_finds_each_spelling(tmp_path: Path, file: str, split: str) -> None:
    write_parquet(tmp_path / "train-00000-of-00001.parquet", [0, 1, 0, 1], classes=["ant", "bee"])
    write_parquet(tmp_path / f"{file}-00000-of-00001.parquet", [1, 0], classes=["ant", "bee"])
    found = open_data(f"{tmp_path}/{{split}}-*.parquet", val_fraction=0)
    assert {name: len(part) for name, part in found.splits.items()} == {"train": 4, split: 2}
    assert found.split(split).labels.tolist() == [1, 0]


def test_a_pattern_reads_its_files_in_order(tmp_path: Path) -> None:
    write_parquet(tmp_path / "b.parquet", ["bee", "bee"])
    write_parquet(tmp_path / "a.parquet", ["ant"])
    split = open_data(f"{tmp_path}/*.parquet", val_fraction=0).split("train")
    assert split.labels.tolist() == [0, 1, 1]
    assert [grey(split, row) for row in range(3)] == [0, 0, 1]


def test_cells_may_be_plain_bytes_or_paths_beside_the_file(tmp_path: Path) -> None:
    (tmp_path / "seven.png").write_bytes(png(7))
    cells = {"bytes": [png(3), png(4)], "path": [{"bytes": None, "path": "seven.png"}] * 2}
    for name, images in cells.items():
        pq.write_table(pa.table({"image": images, "label": [0, 1]}), tmp_path / f"{name}.parquet")
    plain, by_path = (open_data(f"{tmp_path}/{name}.parquet", val_fraction=0) for name in cells)
    assert [grey(plain.split("train"), row) for row in range(2)] == [3, 4]
    assert grey(by_path.split("train"), 0) == 7


@pytest.mark.parametrize("cell", [None, {"bytes": None, "path": None}])
def test_an_empty_cell_is_one_damaged_image(tmp_path: Path, cell: Any) -> None:
    images = [{"bytes": png(3), "path": None}, cell]
    pq.write_table(pa.table({"image": images, "label": [0, 1]}), tmp_path / "a.parquet")
    split = open_data(f"{tmp_path}/a.parquet", val_fraction=0).split("train")
    (batch,) = Loader(split, opened).evaluation_batches(2)
    assert batch.labels.tolist() == [0]
    assert batch.damaged == (("train row 1", "its cell is empty"),)
    assert split.typical_sizes.tolist() == [[2, 3]]


def test_cifar10_has_5000_and_1000_images_a_class(shared: Path) -> None:
    found = open_data(f"{shared}/data/cifar10/{{split}}.parquet", val_fraction=0)
    assert found.classes[:3] == ("airplane", "automobile", "bird")
    assert np.bincount(found.split("train").labels).tolist() == [5000] * 10
    assert np.bincount(found.split("test").labels).tolist() == [1000] * 10


# --- Holding out -----------------------------------------------------------------------------------


def held_out(source: str, **options: Any) -> set[str]:
    return set(open_data(source, **options).split("val").names)


@pytest.fixture
def uneven(tmp_path: Path) -> str:
    return lay(tmp_path / "uneven", *numbered("ant", 20), *numbered("bee", 10), *numbered("cat", 2))


@pytest.mark.parametrize(
    ("fraction", "counts"), [(0.2, [4, 2, 1]), (0.26, [5, 3, 1]), (0.5, [10, 5, 1]), (0.01, [1, 1, 1])]
)
def test_the_same_share_of_each_class_is_held_out(uneven: str, fraction: float, counts: list[int]) -> None:
    found = open_data(uneven, val_fraction=fraction)
    assert found.held_out
    assert np.bincount(found.split("val").labels).tolist() == counts
    assert np.bincount(found.split("train").labels).tolist() == [
        all_ - held for all_, held in zip([20, 10, 2], counts, strict=True)
    ]


def test_no_image_is_in_both_splits_and_none_is_lost(uneven: str) -> None:
    found = names(open_data(uneven))
    assert sorted(found["train"] + found["val"]) == sorted(
        [*numbered("ant", 20), *numbered("bee", 10), *numbered("cat", 2)]
    )


def test_labels_and_images_stay_together(uneven: str) -> None:
    found = open_data(uneven)
    for split in found.splits.values():
        for i, name in enumerate(split.names):
            assert split.images[i] == Path(uneven, name)
            assert found.classes[split.labels[i]] == name.split("/")[0]


def test_the_seed_chooses_the_images(uneven: str) -> None:
    assert held_out(uneven, seed=1) == held_out(uneven, seed=1)
    assert held_out(uneven, seed=1) != held_out(uneven, seed=2)


def test_the_choice_does_not_depend_on_where_the_folder_is(uneven: str, tmp_path: Path) -> None:
    moved = Path(uneven).rename(tmp_path / "elsewhere")
    assert held_out(str(moved)) == held_out(
        lay(Path(uneven), *numbered("ant", 20), *numbered("bee", 10), *numbered("cat", 2))
    )


def test_adding_an_image_moves_at_most_one_other(tmp_path: Path) -> None:
    source = lay(tmp_path, *numbered("ant", 40), *numbered("bee", 40))
    for added in range(8):
        before = held_out(source)
        lay(tmp_path, f"ant/new-{added}.png")
        assert len(before - held_out(source)) <= 1


def test_beside_a_test_split_half_the_share_is_held_out(tmp_path: Path) -> None:
    train = [*numbered("train/ant", 20), *numbered("train/bee", 20)]
    found = open_data(lay(tmp_path, *train, "test/ant/1.png", "test/bee/1.png"), val_fraction=0.2)
    assert {name: len(split) for name, split in found.splits.items()} == {"train": 36, "val": 4, "test": 2}
    assert list(found.splits) == ["train", "val", "test"]


def test_beside_a_test_split_2500_images_are_enough(tmp_path: Path) -> None:
    write_parquet(tmp_path / "test.parquet", [0, 1])
    rows = pa.table({"image": [b""] * 40_000, "label": [0, 1] * 20_000})
    pq.write_table(rows, tmp_path / "train.parquet")
    found = open_data(f"{tmp_path}/{{split}}.parquet", val_fraction=0.2)
    assert np.bincount(found.split("val").labels).tolist() == [1250, 1250]


def test_the_fingerprint_tells_other_images_and_not_another_order(uneven: str) -> None:
    split = open_data(uneven).split("val")
    assert split.take(np.arange(len(split))[::-1]).fingerprint == split.fingerprint
    assert split.take(np.arange(len(split) - 1)).fingerprint != split.fingerprint


# --- Sizes and files -------------------------------------------------------------------------------


def split_of(*images: Any) -> Split:
    return Split(images, np.arange(len(images)), [f"image {i}" for i in range(len(images))])


def test_sizes_are_height_and_width_of_any_encoding(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png(size=(7, 5)))
    sizes = split_of(tmp_path / "a.png", png(size=(4, 9)), Image.new("L", (2, 3))).typical_sizes
    assert sizes.tolist() == [[5, 7], [9, 4], [3, 2]]


def test_sizes_are_of_evenly_chosen_images() -> None:
    pictures = [Image.new("L", (1 + i, 1)) for i in range(100)]
    assert image_sizes(split_of(*pictures), at_most=4)[:, 1].tolist() == [1, 34, 67, 100]


def test_sizes_pass_over_what_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 50)  # past twice as many Pillow refuses
    split = split_of(b"text", b"", tmp_path / "gone.png", png(size=(200, 200)), png(size=(7, 5)))
    assert split.typical_sizes.tolist() == [[5, 7]]


def test_no_readable_image_is_an_error() -> None:
    with pytest.raises(VitralError, match="none of the images could be read, for example image 0"):
        image_sizes(split_of(b"text", b""), 10)


def test_files_folders_and_patterns_in_the_order_given(tmp_path: Path) -> None:
    lay(tmp_path, "b/2.png", "b/deep/1.JPG", "b/notes.txt", *numbered("a", 9), "a/x.txt")
    words = [f"{tmp_path}/b", f"{tmp_path}/a/*", f"{tmp_path}/gone.png"]
    expected = ["b/2.png", "b/deep/1.JPG", *numbered("a", 9), "gone.png"]
    assert find_images(words).files == [f"{tmp_path}/{name}" for name in expected]


def test_a_file_whose_name_looks_like_a_pattern_is_that_file(tmp_path: Path) -> None:
    lay(tmp_path, "photo[1].png", "photo1.png")
    assert find_images([f"{tmp_path}/photo[1].png"]).files == [f"{tmp_path}/photo[1].png"]


@pytest.mark.parametrize("word", ["", "*.png"])
def test_a_folder_or_pattern_without_images_is_an_error(tmp_path: Path, word: str) -> None:
    with pytest.raises(VitralError, match="holds no images"):
        find_images([str(tmp_path / word)])


# --- What cannot be used ---------------------------------------------------------------------------


def assert_refused(source: str | Path, text: str) -> None:
    with pytest.raises(VitralError, match=text) as caught:
        open_data(str(source))
    assert "\n" not in str(caught.value)


BAD_FOLDERS = {
    "no images at all": (["ant/notes.txt"], "holds no images in class folders; put each class's images"),
    "images in no class": (["1.png", "2.png"], "holds no images in class folders"),
    "a table": (
        ["1.png", "labels.csv", "a.tar"],
        r"a folder of its name; or give as DATA what lies there: .*a\.tar, .*labels\.csv$",
    ),
    "tables of splits": (
        ["train-00000-of-00002.parquet", "train-00001-of-00002.parquet", "validation-00000-of-00001.parquet"],
        r"what lies there: .*/\{split\}-\*\.parquet$",
    ),
    "one class": (["ant/1.png"], "has one class only, 'ant'; a classifier needs two or more"),
    "a class that test lacks": (
        ["train/ant/1.png", "train/bee/1.png", "train/cat/1.png", "test/ant/1.png", "test/bee/1.png"],
        "train and .*test differ: only in the first: cat; only in the second: none",
    ),
    "other classes": (
        ["train/ant/1.png", "train/bee/1.png", "test/ant/1.png", "test/dog/1.png"],
        "differ: only in the first: bee; only in the second: dog",
    ),
    "a class without test images": (
        ["train/ant/1.png", "train/bee/1.png", "test/ant/1.png", "test/bee/x.txt"],
        "no images of bee in 'test'",
    ),
    "nothing to hold out": (["ant/1.png", "bee/1.png"], "no image can be held out to validate on"),
}


@pytest.mark.parametrize(("files", "text"), BAD_FOLDERS.values(), ids=BAD_FOLDERS.keys())
def test_a_folder_that_cannot_be_used_says_why(tmp_path: Path, files: list[str], text: str) -> None:
    assert_refused(lay(tmp_path, *files), text)


def test_a_missing_folder_says_what_data_may_be(tmp_path: Path) -> None:
    assert_refused(tmp_path / "gone", "gone does not exist; DATA is an image folder, a table")


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    lay(tmp_path, "ant.png")
    assert_refused(tmp_path / "ant.png", "is a file, not a folder")


def test_a_missing_parquet_file(tmp_path: Path) -> None:
    assert_refused(tmp_path / "gone.parquet", "no file matches .*gone.parquet")
    write_parquet(tmp_path / "test.parquet", [0, 1])
    assert_refused(f"{tmp_path}/{{split}}.parquet", "no file matches .*train.parquet")


def test_parquet_without_the_columns_says_which_it_has(tmp_path: Path) -> None:
    pq.write_table(pa.table({"pixels": [b""], "label": [0]}), tmp_path / "a.parquet")
    assert_refused(tmp_path / "a.parquet", "has no column image; it has pixels, label")
    pq.write_table(pa.table({"x": [0]}), tmp_path / "a.parquet")
    assert_refused(tmp_path / "a.parquet", "has no column image and label; it has x")


def test_damaged_parquet(tmp_path: Path) -> None:
    source = Path(write_parquet(tmp_path / "a.parquet", [0, 1]))
    for content in (source.read_bytes()[:-20], b"text", b""):
        source.write_bytes(content)
        assert_refused(source, "a.parquet cannot be read as a parquet file")


def test_parquet_files_of_different_columns(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", [0, 1])
    write_parquet(tmp_path / "b.parquet", ["ant", "bee"])
    assert_refused(f"{tmp_path}/*.parquet", "labels of .*a.parquet, .*b.parquet are of different types")


@pytest.mark.parametrize(("label", "text"), [(-1, "-1"), (2, "2"), (None, "None")])
def test_only_the_labels_that_the_classes_lack_are_named(tmp_path: Path, label: Any, text: str) -> None:
    source = write_parquet(tmp_path / "a.parquet", [0, 1, label], classes=["ant", "bee"])
    assert_refused(source, f"'train' has labels that the classes lack: {text}$")


def test_empty_label_cells(tmp_path: Path) -> None:
    source = write_parquet(tmp_path / "a.parquet", ["ant", "bee", None])
    assert_refused(source, "the label column has empty cells; each image needs a label")


@pytest.mark.parametrize(
    ("labels", "text"), [([0, 0], "no images of bee in 'test'"), ([], "no images of ant, bee in 'test'")]
)
def test_a_parquet_class_missing_in_test(tmp_path: Path, labels: list[int], text: str) -> None:
    write_parquet(tmp_path / "train.parquet", [0, 1], classes=["ant", "bee"])
    empty = pa.table({"image": pa.array([], pa.binary()), "label": pa.array([], pa.int64())})
    if labels:
        write_parquet(tmp_path / "test.parquet", labels)
    else:
        pq.write_table(empty, tmp_path / "test.parquet")
    assert_refused(f"{tmp_path}/{{split}}.parquet", text)


def test_a_split_that_is_not_there(uneven: str) -> None:
    with pytest.raises(VitralError, match="has no 'test' split; it has 'train', 'val'"):
        open_data(uneven).split("test")


# --- Batches ---------------------------------------------------------------------------------------


def opened(source: Any) -> torch.Tensor:
    return pil_to_tensor(open_image(source))


def noisy(source: Any) -> torch.Tensor:
    """What an augmentation does: it draws from torch's global generator."""
    return opened(source) + torch.rand(3, 2, 3)


def greys(count: int) -> Split:
    """Image i is of grey i and its label is i."""
    return split_of(*[png(grey) for grey in range(count)])


def stream(steps: int, *, seed: int = 0, first_step: int = 0, workers: int = 0) -> list[Batch]:
    """Of 13 images in batches of 4: three steps an epoch, with one image left out."""
    loader = Loader(greys(13), opened, Loading(workers))
    batches = loader.training_batches(noisy, batch_size=4, seed=seed, first_step=first_step)
    return list(islice(batches, steps))


def labels(batches: Sequence[Batch]) -> list[int]:
    return torch.cat([batch.labels for batch in batches]).tolist()


def assert_same_bits(ours: Sequence[Batch], theirs: Sequence[Batch]) -> None:
    assert labels(ours) == labels(theirs)
    assert all(torch.equal(a.images, b.images) for a, b in zip(ours, theirs, strict=True))


def test_each_epoch_has_no_image_twice_and_leaves_out_less_than_a_batch() -> None:
    batches = stream(9)
    for epoch in (batches[:3], batches[3:6], batches[6:]):
        assert len(set(labels(epoch))) == 12


def test_every_image_is_seen_when_batches_divide_the_epoch() -> None:
    batches = Loader(greys(12), opened).training_batches(opened, batch_size=4, seed=0)
    assert sorted(labels(list(islice(batches, 3)))) == list(range(12))


def test_images_come_with_their_labels() -> None:
    for batch in stream(3):
        assert batch.images.floor()[:, 0, 0, 0].tolist() == batch.labels.tolist()


def test_epochs_differ_in_order_and_in_noise() -> None:
    first, second = stream(6)[:3], stream(6)[3:]
    assert labels(first) != labels(second)
    noise = [
        {
            label: image
            for batch in epoch
            for label, image in zip(batch.labels.tolist(), batch.images, strict=True)
        }
        for epoch in (first, second)
    ]
    both = noise[0].keys() & noise[1].keys()
    assert len(both) >= 11
    assert not any(torch.equal(noise[0][label], noise[1][label]) for label in both)


def test_the_seed_decides_order_and_noise() -> None:
    assert_same_bits(stream(6, seed=1), stream(6, seed=1))
    assert labels(stream(3, seed=1)) != labels(stream(3, seed=2))


def test_noise_does_not_depend_on_what_was_drawn_before() -> None:
    once = stream(3)
    torch.rand(5)
    assert_same_bits(stream(3), once)


@pytest.mark.parametrize("first_step", [1, 3, 4])
def test_started_later_it_is_the_tail_of_the_whole(first_step: int) -> None:
    assert_same_bits(stream(7, first_step=first_step), stream(7 + first_step)[first_step:])


def test_workers_change_nothing() -> None:
    assert_same_bits(stream(7, workers=2), stream(7))


def repeated(
    steps: int, repeats: int, *, count: int = 13, first_step: int = 0, workers: int = 0
) -> list[Batch]:
    loader, sampling = Loader(greys(count), opened, Loading(workers)), Sampling(repeats=repeats)
    batches = loader.training_batches(noisy, batch_size=4, seed=0, first_step=first_step, sampling=sampling)
    return list(islice(batches, steps))


@pytest.mark.parametrize("repeats", [1, 2, 3, 5])
def test_repeated_augmentation_orders_images_as_timms_sampler_does(repeats: int) -> None:
    samplers = pytest.importorskip("timm.data.distributed_sampler")
    # Our order without repeats is what the sampler shuffles; without shuffling it only repeats.
    once = labels(repeated(3, 1, count=12))
    sampler = samplers.RepeatAugSampler(
        range(12), num_replicas=1, rank=0, shuffle=False, num_repeats=repeats, selected_round=0
    )
    assert labels(repeated(3, repeats, count=12)) == [once[place] for place in sampler]


def test_each_copy_of_an_image_is_altered_anew_and_the_first_as_ever() -> None:
    images = torch.cat([batch.images for batch in repeated(3, 3)])
    copies = images.reshape(4, 3, *images.shape[1:])
    for first, second, third in copies:
        assert not torch.equal(first, second)
        assert not torch.equal(second, third)
    once = torch.cat([batch.images for batch in repeated(1, 1)])
    assert torch.equal(copies[:, 0], once)


@pytest.mark.parametrize("first_step", [1, 2, 3, 4])
def test_repeated_augmentation_can_start_anywhere(first_step: int) -> None:
    assert_same_bits(repeated(5, 3, first_step=first_step), repeated(5 + first_step, 3)[first_step:])


def test_repeated_augmentation_is_the_same_with_workers() -> None:
    assert_same_bits(repeated(7, 3, workers=2), repeated(7, 3))


def test_evaluation_sees_every_image_once_in_order() -> None:
    batches = list(Loader(greys(13), opened).evaluation_batches(4))
    assert [len(batch.labels) for batch in batches] == [4, 4, 4, 1]
    assert labels(batches) == list(range(13))
    assert torch.cat([batch.images for batch in batches])[:, 0, 0, 0].tolist() == list(range(13))


def test_evaluation_with_workers_keeps_the_order() -> None:
    assert labels(list(Loader(greys(13), opened, Loading(2)).evaluation_batches(4))) == list(range(13))


@pytest.mark.parametrize("workers", [0, 2])
def test_damaged_images_are_left_out_and_named(workers: int) -> None:
    split = split_of(png(0), b"text", png(2), png(3)[:30], png(4))
    first, second = Loader(split, opened, Loading(workers)).evaluation_batches(3)
    assert first.labels.tolist() == [0, 2]
    assert first.images.shape == (2, 3, 2, 3)
    assert [name for name, _ in (*first.damaged, *second.damaged)] == ["image 1", "image 3"]
    assert "not an image" in first.damaged[0][1]
    assert second.labels.tolist() == [4]


def test_a_batch_of_damaged_images_only_is_empty() -> None:
    (batch,) = Loader(split_of(b"", b""), opened).evaluation_batches(2)
    assert len(batch.labels) == len(batch.images) == 0
    assert len(batch.damaged) == 2


def test_another_error_of_the_transform_is_not_taken_for_damage() -> None:
    def broken(_: Any) -> torch.Tensor:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        next(Loader(greys(2), broken).evaluation_batches(2))


# --- Damage and seeds ------------------------------------------------------------------------------


def damaged(*names: str) -> Batch:
    return Batch(torch.empty(0), torch.empty(0), tuple((name, "torn") for name in names))


def test_each_damaged_image_is_named_once() -> None:
    said: list[str] = []
    count = DamageCount(100, 0.5, said.append)
    for batch in (damaged("a", "b"), damaged("b"), damaged("a")):
        count.add(batch)
    assert said == ["skipped damaged image a: torn", "skipped damaged image b: torn"]


def test_the_limit_is_a_share_of_all_images() -> None:
    count = DamageCount(100, 0.02, lambda _: None)
    count.add(damaged("a", "b"))
    with pytest.raises(
        VitralError, match=r"3 of 100 images are damaged, more than the limit of 2\.0%: a, b, c"
    ):
        count.add(damaged("c"))


def test_a_limit_of_0_allows_none() -> None:
    with pytest.raises(VitralError, match="1 of 100 images are damaged"):
        DamageCount(100, 0, lambda _: None).add(damaged("a"))


def draw(*key: int) -> float:
    with seeded(*key):
        return torch.rand(1).item()


def test_seeded_depends_on_its_key_alone() -> None:
    first = draw(0, 1)
    torch.manual_seed(99)
    assert draw(0, 1) == first
    keys = [(0, 1), (1, 0), (0, 1, 0), (1,), (0,), (10,), (0, 11), (-1,)]
    assert len({draw(*key) for key in keys}) == len(keys)


def test_seeded_leaves_the_generator_as_it_was() -> None:
    before = torch.get_rng_state()
    with seeded(1), seeded(2):
        torch.rand(3)
    with pytest.raises(ImageError), seeded(3):
        raise ImageError
    assert torch.equal(torch.get_rng_state(), before)


def test_seeds_are_spread_evenly() -> None:
    counts = Counter(int(10 * draw(0, epoch, row)) for epoch in range(20) for row in range(50))
    # Of 1,000 draws 100 fall in each tenth, give or take four standard deviations.
    assert all(100 - 38 < counts[tenth] < 100 + 38 for tenth in range(10))


def test_a_balanced_epoch_draws_every_class_as_often() -> None:
    labels = np.array([0] * 90 + [1] * 9 + [2] * 3)
    order = Sampling(balanced=True).order(labels, np.random.default_rng(0))
    assert len(order) == 102
    assert np.bincount(labels[order]).tolist() == [34, 34, 34]
    times = np.bincount(order, minlength=102)
    # None twice before all of its class have come once: 34 draws of 90, of 9 and of 3 images.
    assert times[:90].max() == 1
    assert set(times[90:99]) == {3, 4}
    assert set(times[99:]) == {11, 12}


def test_a_balanced_run_may_begin_at_any_step() -> None:
    def first_batches(first_step: int, count: int) -> list[list[int]]:
        split = replace(greys(13), labels=np.array([0] * 10 + [1] * 3))
        batches = Loader(split, opened).training_batches(
            noisy, batch_size=4, seed=0, first_step=first_step, sampling=Sampling(balanced=True)
        )
        return [batch.images.flatten().tolist() for batch, _ in zip(batches, range(count), strict=False)]

    assert first_batches(0, 8)[5:] == first_batches(5, 3)
