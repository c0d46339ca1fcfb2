"""Folders by what they hold, and parquet files of every kind, against what was written into them."""

import io
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from vitral.checkpoints.layouts.labels import imagenet_labels
from vitral.data.image_data import ImageData, open_data
from vitral.data.sources import find_images
from vitral.evaluation import evaluate as evaluation
from vitral.evaluation import imagenet
from vitral.runtime.errors import ImageError, VitralError


def png(seed: int) -> bytes:
    file = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (4, 5, 3)).astype(np.uint8)
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def lay(root: Path, *names: str) -> str:
    """Writes an image of its own at each name."""
    for number, name in enumerate(names):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(number))
    return str(root)


def in_classes(folder: str, count: int = 4, classes: Sequence[str] = ("ant", "bee")) -> list[str]:
    return [f"{folder}/{name}/{number}.png" for name in classes for number in range(count)]


def sizes(found: ImageData) -> dict[str, int]:
    return {name: len(split) for name, split in found.splits.items()}


def refusal(source: str | Path) -> str:
    with pytest.raises(VitralError) as caught:
        open_data(str(source))
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- What a folder is ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("train", "other", "role"),
    [
        ("Training", "Testing", "test"),
        ("Train", "Val", "val"),
        ("seg_train", "seg_test", "test"),
        ("TRAIN", "TEST", "test"),
        ("train_images", "validation_images", "val"),
        ("Training Set", "Dev Set", "val"),
    ],
)
def test_the_usual_names_of_splits_in_any_case(tmp_path: Path, train: str, other: str, role: str) -> None:
    found = open_data(lay(tmp_path, *in_classes(train), *in_classes(other, 2)), val_fraction=0)
    assert found.classes == ("ant", "bee")
    assert sizes(found) == {"train": 8, role: 4}


def test_a_class_may_be_called_train_or_test(tmp_path: Path) -> None:
    files = [f"{name}/{number}.png" for name in ("car", "train", "test tube") for number in range(3)]
    found = open_data(lay(tmp_path, *files))
    assert found.classes == ("car", "test tube", "train")


def test_a_folder_round_all_is_of_no_meaning(tmp_path: Path) -> None:
    names = [
        *in_classes("archive/data/seg_train/seg_train"),
        *in_classes("archive/data/seg_test/seg_test", 1),
    ]
    found = open_data(lay(tmp_path, *names), val_fraction=0)
    assert found.classes == ("ant", "bee")
    assert sizes(found) == {"train": 8, "test": 2}


AMBIGUOUS = {
    "pictures and masks": (
        [*in_classes("images"), *in_classes("masks")],
        r"what are images, masks\? Each holds the folders ant, bee; name splits train, val",
    ),
    "val and test alone": ([*in_classes("val"), *in_classes("test")], r"what are test, val\?"),
    "a split or a class": (
        [*in_classes("train"), "plane/1.png", "car/1.png"],
        r"is train a split or a class\? Beside it lies car, plane; give .*/train as DATA, or rename it",
    ),
    "two of a kind": (
        [*in_classes("train"), *in_classes("val"), *in_classes("valid")],
        r"which is the val split, val, valid\? Rename or remove the others",
    ),
}


@pytest.mark.parametrize(("files", "text"), AMBIGUOUS.values(), ids=AMBIGUOUS.keys())
def test_what_may_be_read_in_two_ways_is_asked_for(tmp_path: Path, files: list[str], text: str) -> None:
    assert re.search(text, refusal(lay(tmp_path, *files)))


@pytest.mark.parametrize("loose", [["test/1.png", "test/2.png"], ["test/all/1.png", "test/all/2.png"]])
def test_pictures_of_no_class_in_test_are_left_out_and_told(tmp_path: Path, loose: list[str]) -> None:
    found = open_data(lay(tmp_path, *in_classes("train"), *loose))
    assert list(found.splits) == ["train", "val"]
    assert found.notes == ("left out test: its 2 images are in no class folder",)
    assert found.describe().splitlines()[-1] == found.notes[0]


def test_litter_and_empty_folders_stop_nothing(tmp_path: Path) -> None:
    lay(
        tmp_path, *in_classes(".")[:8], "__MACOSX/ant/._1.png", ".git/x.png", "ant/.DS_Store", "bee/Thumbs.db"
    )
    for name in ("empty", "ant/empty", ".hidden"):
        (tmp_path / name).mkdir()
    found = open_data(str(tmp_path), val_fraction=0)
    assert found.classes == ("ant", "bee")
    assert found.notes == ("skipped folders without images: empty",)


def test_what_is_passed_over_is_counted_by_kind(tmp_path: Path) -> None:
    lay(tmp_path, *in_classes(".")[:8], "ant/a.txt", "ant/b.txt", "bee/labels.csv", "1.png", "bee/7.jpe")
    (tmp_path / "bee" / "README").write_text("no picture")
    found = open_data(str(tmp_path), val_fraction=0)
    assert len(found.split("train")) == 9
    assert found.notes == (
        "skipped files that are not images: 2 .txt, 1 .csv, 1 without a suffix",
        "left out 1 images that are in no class folder",
    ) or set(found.notes[0].split(": ")[1].split(", ")) == {"2 .txt", "1 .csv", "1 without a suffix"}


def test_a_class_of_heic_alone_is_not_lost_in_silence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vitral.images.files.heif_is_there", lambda: False)
    lay(tmp_path, *in_classes("."), "cat/1.heic", "cat/2.HEIC")
    assert re.search(r"all images of .*cat are HEIC; .*pip install 'vitral\[heif\]'", refusal(tmp_path))


def test_other_folders_beside_splits_are_told(tmp_path: Path) -> None:
    found = open_data(lay(tmp_path, *in_classes("train"), *in_classes("test", 1), "seg_pred/1.png"))
    assert "skipped folders that are not a split: seg_pred" in found.notes


# --- Links -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", [".", "..", "../bee", "/"])
def test_each_real_folder_is_entered_once_and_at_its_own_place(tmp_path: Path, target: str) -> None:
    root = tmp_path / "data"
    lay(root, *in_classes("."))
    (root / "ant" / "link").symlink_to(target)
    found = open_data(str(root), val_fraction=0)
    split = found.split("train")
    assert sorted(split.names) == sorted(name[2:] for name in in_classes("."))
    assert all(
        name.startswith(found.classes[label]) for name, label in zip(split.names, split.labels, strict=True)
    )
    assert found.notes == (f"skipped links to folders that are elsewhere too: {root}/ant/link",)


def test_classes_may_be_links_to_folders_elsewhere(tmp_path: Path) -> None:
    lay(tmp_path / "store", *in_classes("."))
    (tmp_path / "data").mkdir()
    for name in ("ant", "bee"):
        (tmp_path / "data" / name).symlink_to(tmp_path / "store" / name)
    found = open_data(str(tmp_path / "data"), val_fraction=0)
    assert len(found.split("train")) == 8
    assert not found.notes


def test_files_that_are_links_to_nowhere_are_passed_over(tmp_path: Path) -> None:
    lay(tmp_path, *in_classes("."))
    (tmp_path / "ant" / "9.png").symlink_to("gone.png")
    (tmp_path / "ant" / "circle.png").symlink_to("circle.png")
    found = open_data(str(tmp_path), val_fraction=0)
    assert len(found.split("train")) == 8
    assert found.notes == ("skipped files that are not images: 2 link to nowhere",)


@pytest.mark.parametrize("how", ["link", "hard link", "copy"])
def test_an_image_in_train_and_in_val_is_told(tmp_path: Path, how: str) -> None:
    lay(tmp_path, *in_classes("train"), *(f"val/{name}/{n}.png" for name in ("ant", "bee") for n in (7, 8)))
    for number, file in enumerate(sorted((tmp_path / "val").rglob("*.png"))):
        file.write_bytes(png(100 + number))
    first, second = tmp_path / "train/ant/0.png", tmp_path / "val/bee/9.png"
    match how:
        case "link":
            second.symlink_to(first)
        case "hard link":
            second.hardlink_to(first)
        case "copy":
            second.write_bytes(first.read_bytes())
    (note,) = open_data(str(tmp_path)).notes
    assert note.startswith(
        "1 of the val images are in train too, such as val/bee/9.png, there train/ant/0.png"
    )


def test_rows_of_parquet_in_train_and_in_test_are_told(tmp_path: Path) -> None:
    for name, rows in (("train", range(20)), ("test", (30, 3, 7, 31))):
        table = pa.table({"image": [png(row) for row in rows], "label": [row % 2 for row in rows]})
        pq.write_table(table, tmp_path / f"{name}.parquet")
    (note,) = open_data(f"{tmp_path}/{{split}}.parquet").notes
    assert re.match(r"2 of the test images are in train too, such as test row 1, there train row \d+", note)


# --- Names and permissions -------------------------------------------------------------------------


def test_names_that_are_no_text_are_held_out_like_others(tmp_path: Path) -> None:
    lay(tmp_path, *in_classes(".", 10))
    (tmp_path / "ant" / "0.png").rename(tmp_path / os.fsdecode(b"ant/caf\xe9.png"))
    found = open_data(str(tmp_path))
    names = [name for split in found.splits.values() for name in split.names]
    (odd,) = (name for name in names if "caf" in name)
    assert os.fsencode(json.loads(json.dumps(odd))) == b"ant/caf\xe9.png"


def without_permission(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    scan = os.scandir

    def scandir(path: Any) -> Any:
        if Path(path).name == name:
            raise PermissionError(13, "Permission denied")
        return scan(path)

    monkeypatch.setattr(os, "scandir", scandir)


def test_a_folder_that_cannot_be_listed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lay(tmp_path, *in_classes("."), "ant/closed/1.png")
    without_permission(monkeypatch, "closed")
    text = f"{tmp_path}/ant/closed may not be listed: permission is missing"
    assert text in refusal(tmp_path)
    found = find_images([str(tmp_path)])
    assert len(found.files) == 8
    assert found.failures == (text,)
    assert found.summary(0) == "1 folders could not be listed"
    assert found.summary(2) == "2 of 8 images could not be read; 1 folders could not be listed"


# --- Labels of parquet -----------------------------------------------------------------------------


def write(path: Path, labels: Any, features: Any = None, **columns: Any) -> Path:
    count = len(labels)
    table = pa.table({"image": [png(row) for row in range(count)], "label": labels, **columns})
    if features is not None:
        text = features if isinstance(features, str) else json.dumps({"info": {"features": features}})
        table = table.replace_schema_metadata({"huggingface": text})
    pq.write_table(table, path)
    return path


TRUTH = np.array([[1, 0, 0], [0, 1, 1], [0, 0, 1], [1, 1, 0], [0, 0, 0], [1, 0, 1], [0, 1, 0], [1, 1, 1]])


@pytest.mark.parametrize("cast", [float, int, bool])
@pytest.mark.parametrize("names", [None, ["ant", "bee", "cat"]])
def test_vectors_of_0_and_1_say_it_of_each_class(tmp_path: Path, cast: type, names: list[str] | None) -> None:
    features = {"label": {"feature": {"names": names, "_type": "ClassLabel"}}} if names else None
    rows = [[cast(value) for value in row] for row in TRUTH]
    found = open_data(str(write(tmp_path / "a.parquet", rows, features)), val_fraction=0)
    assert found.classes == tuple(names or ("0", "1", "2"))
    np.testing.assert_array_equal(found.split("train").labels, TRUTH > 0)


def test_lists_of_two_classes_stay_lists(tmp_path: Path) -> None:
    rows = [[0], [1], [0], [1], [0, 1], []]
    found = open_data(str(write(tmp_path / "a.parquet", rows)), val_fraction=0)
    assert found.split("train").labels.astype(int).tolist() == [
        [1, 0],
        [0, 1],
        [1, 0],
        [0, 1],
        [1, 1],
        [0, 0],
    ]


def test_a_test_split_without_labels_is_left_out(tmp_path: Path) -> None:
    write(tmp_path / "train.parquet", [row % 3 for row in range(24)])
    write(tmp_path / "test.parquet", [-1, -1, -1])
    found = open_data(f"{tmp_path}/{{split}}.parquet")
    assert found.classes == ("0", "1", "2")
    assert list(found.splits) == ["train", "val"]
    assert "left out test: its 3 rows have no labels" in found.notes


NAN = float("nan")
BAD_LABELS = {
    "not a number": ([0.0, 1.0, NAN], None, "'train' has labels that are not whole numbers, such as nan"),
    "fractions": ([0.25, 1.5, 2.0], None, "not whole numbers"),
    "infinite": ([0.0, 1.0, float("inf")], None, "not whole numbers, such as inf"),
    "bytes": ([b"ant", b"bee", b"ant"], None, "the labels are binary; they must be numbers, text"),
    "dates": (pa.array([1, 2, 3], pa.timestamp("s")), None, r"the labels are timestamp"),
    "structures": ([{"a": 1}, {"a": 2}, {"a": 1}], None, "the labels are struct"),
    "lists of lists": ([[[1]], [[2]], [[1]]], None, "the labels are list"),
    "soft labels": ([[0.3, 0.7], [0.5, 0.5], [1.0, 0.0]], None, "lists of fractions or of true and false"),
    "vectors of two lengths": ([[True, False], [True], [False]], None, "lists of fractions or of true and"),
    "vectors and other names": (
        [[1, 0, 0], [0, 1, 0], [0, 0, 1]],
        {"label": {"feature": {"names": ["ant", "bee"]}}},
        "the labels are vectors of 3, and 2 classes are named",
    ),
    "an empty label in a list": ([[0], [1, None], [1]], None, "empty cells"),
    "metadata that is no JSON": ([0, 1, 0], "{", "metadata of the file cannot be read"),
    "metadata that is a list": ([0, 1, 0], "[1]", "metadata of the file cannot be read"),
    "features that are text": ([0, 1, 0], {"label": "x"}, "metadata of the file cannot be read"),
    "features that are a number": ([0, 1, 0], json.dumps({"info": {"features": 3}}), "cannot be read"),
    "names that are a number": ([0, 1, 0], {"label": {"names": 7}}, "by what is no list of names"),
    "names that are numbers": ([0, 1, 0], {"label": {"names": [0, 1]}}, "by what is no list of names"),
    "no names": ([0, 1, 0], {"label": {"names": []}}, "by what is no list of names"),
    "a name twice": ([0, 1, 0], {"label": {"names": ["ant", "ant"]}}, "names two classes 'ant'"),
    "deep metadata": ([0, 1, 0], "[" * 100_000, "cannot be read"),
}


@pytest.mark.parametrize(("labels", "features", "text"), BAD_LABELS.values(), ids=BAD_LABELS.keys())
def test_labels_that_cannot_be_meant(tmp_path: Path, labels: Any, features: Any, text: str) -> None:
    assert re.search(text, refusal(write(tmp_path / "a.parquet", labels, features)))


def test_text_in_one_split_and_numbers_in_the_other(tmp_path: Path) -> None:
    write(tmp_path / "train.parquet", ["1", "2", "1", "2"])
    write(tmp_path / "test.parquet", [1, 2])
    assert "text in some of train, test and numbers in others" in refusal(f"{tmp_path}/{{split}}.parquet")


def test_labels_of_pandas_categories(tmp_path: Path) -> None:
    labels = pa.array(["bee", "ant", "bee", "ant"]).dictionary_encode()
    found = open_data(str(write(tmp_path / "a.parquet", labels)), val_fraction=0)
    assert found.classes == ("ant", "bee")
    assert found.split("train").labels.tolist() == [1, 0, 1, 0]


# --- Images of parquet -----------------------------------------------------------------------------


def write_paths(file: Path, images: Any) -> str:
    file.parent.mkdir(parents=True, exist_ok=True)
    labels = ["ant", "bee"] * (len(images) // 2)
    pq.write_table(pa.table({"image": images, "label": labels}), file)
    return str(file)


@pytest.fixture
def store(tmp_path: Path) -> Path:
    for row in range(4):
        file = tmp_path / "store" / "img" / f"{row}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(png(row))
    return tmp_path / "store"


def contents(source: str) -> list[bytes]:
    images = open_data(source, val_fraction=0).split("train").images
    found = [images[row] for row in range(len(images))]
    return [image if isinstance(image, bytes) else image.read_bytes() for image in found]  # pyrefly: ignore


@pytest.mark.parametrize("kind", ["relative", "absolute", "struct", "dictionary"])
def test_paths_are_relative_to_their_file(store: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir("/")
    paths: Any = [f"img/{row}.png" for row in range(4)]
    match kind:
        case "absolute":
            paths = [str(store / path) for path in paths]
        case "struct":
            paths = [{"bytes": None, "path": path} for path in paths]
        case "dictionary":
            paths = pa.array(paths).dictionary_encode()
    assert contents(write_paths(store / "a.parquet", paths)) == [png(row) for row in range(4)]


def test_each_file_of_a_pattern_has_its_own_folder(tmp_path: Path) -> None:
    for part in range(2):
        folder = tmp_path / f"part-{part}"
        folder.mkdir()
        for row in range(2):
            (folder / f"{row}.png").write_bytes(png(10 * part + row))
        write_paths(folder / "a.parquet", ["0.png", "1.png"])
    assert contents(f"{tmp_path}/*/a.parquet") == [png(0), png(1), png(10), png(11)]


@pytest.mark.parametrize("form", ["../secret.png", "{outside}", "img/../../secret.png"])
@pytest.mark.parametrize("struct", [False, True])
def test_paths_out_of_the_files_folder_are_refused_unless_allowed(
    store: Path, form: str, struct: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    outside = store.parent / "secret.png"
    outside.write_bytes(png(99))
    paths: list[Any] = ["img/0.png", form.format(outside=outside)]
    if struct:
        paths = [{"bytes": None, "path": path} for path in paths]
    source = write_paths(store / "a.parquet", paths)
    text = r"lies outside of the file's folder; .* VITRAL_IMAGE_FOLDERS="
    if struct:  # beside which bytes may stand, that are not read before they are asked for
        with pytest.raises(ImageError, match=text):
            open_data(source, val_fraction=0).split("train").images[1]
    else:
        assert re.search(text, refusal(source))
    monkeypatch.setenv("VITRAL_IMAGE_FOLDERS", f"/nowhere{os.pathsep}{store.parent}")
    assert contents(source) == [png(0), png(99)]


def test_paths_beside_bytes_are_names_alone(tmp_path: Path) -> None:
    images = [{"bytes": png(row), "path": f"/elsewhere/{row}.png"} for row in range(2)]
    assert contents(write_paths(tmp_path / "a.parquet", images)) == [png(0), png(1)]


def test_addresses_are_refused(tmp_path: Path) -> None:
    source = write_paths(tmp_path / "a.parquet", ["https://example.org/1.png", "https://example.org/2.png"])
    assert "is an address; store the images beside the file" in refusal(source)


@pytest.mark.parametrize(
    "images",
    [[1, 2], [1.5, 2.5], [[1, 2], [3]], [{"data": b""}] * 2, [{"bytes": "text", "path": 3}] * 2],
    ids=["numbers", "fractions", "lists", "another structure", "a structure of other types"],
)
def test_images_of_other_kinds_are_refused(tmp_path: Path, images: Any) -> None:
    source = write_paths(tmp_path / "a.parquet", images)
    assert re.search(r"images are .*; they must be bytes, paths, or \{bytes, path\}", refusal(source))


def test_a_pipe_in_place_of_a_file_is_refused(store: Path) -> None:
    os.mkfifo(store / "pipe.parquet")
    assert "is a named pipe; only regular files are read" in refusal(store / "pipe.parquet")
    os.mkfifo(store / "img" / "pipe.png")
    source = write_paths(store / "a.parquet", ["img/0.png", "img/pipe.png"])
    images = open_data(source, val_fraction=0).split("train").images
    with pytest.raises(ImageError, match="is a named pipe"):
        images[1]


def test_a_column_twice_is_refused(tmp_path: Path) -> None:
    table = pa.table([pa.array([png(0)]), pa.array([0]), pa.array([1])], names=["image", "label", "label"])
    pq.write_table(table, tmp_path / "a.parquet")
    assert "has 2 columns 'label'" in refusal(tmp_path / "a.parquet")


# --- ImageNet's folders ----------------------------------------------------------------------------


def test_wnids_stand_for_the_classes_of_an_imagenet_model() -> None:
    labels = imagenet_labels()
    assert imagenet.class_indices(["n01440764", "n02085620-Chihuahua"], labels) == [0, 151]
    synonyms = [f"{label}, another name" for label in labels]
    assert imagenet.class_indices(["n01443537"], synonyms) == [1]
    assert imagenet.class_indices(["n01440764", "cat"], labels) is None
    assert imagenet.class_indices(["n99999999"], labels) is None
    assert imagenet.class_indices(["n01440764"], [f"class {i}" for i in range(1000)]) is None
    assert imagenet.class_indices(["n01440764"], ["tench"]) is None


def test_the_shared_photographs_are_named_as_their_ids_say(shared: Path) -> None:
    labels = imagenet_labels()
    for file in (shared / "data" / "photos").iterdir():
        wnid, _, name = file.stem.partition("_")
        (index,) = imagenet.class_indices([wnid], labels) or [-1]
        assert labels[index].lower().replace(" ", "_")[:5] == name.lower()[:5], file.name


def test_evaluation_relabels_folders_of_wnids(tmp_path: Path) -> None:
    found = open_data(lay(tmp_path, *in_classes(".", 2, ("n01443537", "n02085620"))), val_fraction=0)
    split = evaluation.relabelled(found.split("train"), found.classes, imagenet_labels())
    assert split.labels.tolist() == [1, 1, 151, 151]
