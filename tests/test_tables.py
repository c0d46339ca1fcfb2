"""Tables of every kind against what was written into them, and beside the same pictures as a folder."""

import csv
import io
import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from sklearn.model_selection import StratifiedGroupKFold

from vitral.data.columns import Columns
from vitral.data.image_data import ImageData, open_data
from vitral.data.sources import find_unlabelled
from vitral.data.split import Split
from vitral.data.subsets import hold_out
from vitral.evaluation.evaluate import choose_split
from vitral.inference.classifier import load
from vitral.recipes.schema import opening
from vitral.reports.train import train
from vitral.runtime.errors import ImageError, VitralError


def png(seed: int) -> bytes:
    file = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (4, 5, 3)).astype(np.uint8)
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Six pictures of two classes in folders of their names."""
    for number in range(6):
        file = tmp_path / ("ant" if number < 3 else "bee") / f"{number}.png"
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(png(number))
    return tmp_path


PATHS = [f"{'ant' if number < 3 else 'bee'}/{number}.png" for number in range(6)]
LABELS = ["ant"] * 3 + ["bee"] * 3


def write(file: Path, columns: dict[str, list], *, before: str = "", **format: Any) -> str:
    with file.open("w", newline="", encoding="utf-8") as lines:
        lines.write(before)
        writer = csv.writer(lines, **format)
        writer.writerow(columns)
        writer.writerows(zip(*columns.values(), strict=True))
    return str(file)


def plain(root: Path, **columns: list) -> str:
    return write(root / "table.csv", {"image": PATHS, "label": LABELS} | columns)


def opened(source: str, **columns: str) -> ImageData:
    return open_data(source, val_fraction=0, columns=Columns(**columns))  # pyrefly: ignore[bad-argument-type]


def refusal(source: str, **columns: str) -> str:
    with pytest.raises(VitralError) as caught:
        opened(source, **columns)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def contents(split: Split) -> list[bytes]:
    return [split.images[row].read_bytes() for row in range(len(split))]  # pyrefly: ignore


# --- The kinds of tables ---------------------------------------------------------------------------


def as_csv(root: Path) -> str:
    return plain(root)


def as_excel_csv(root: Path) -> str:
    """With a byte order mark, semicolons, quotes and CRLF."""
    columns = {"image": PATHS, "label": LABELS}
    return write(root / "table.csv", columns, before="\ufeff", delimiter=";", quoting=csv.QUOTE_ALL)


def as_tsv(root: Path) -> str:
    return write(root / "table.tsv", {"image": PATHS, "label": LABELS}, delimiter="\t", lineterminator="\n")


def as_jsonl(root: Path) -> str:
    rows = [json.dumps({"image": path, "label": label}) for path, label in zip(PATHS, LABELS, strict=True)]
    (root / "table.jsonl").write_text("\n".join(rows))
    return str(root / "table.jsonl")


def as_parquet(root: Path) -> str:
    pq.write_table(pa.table({"image": PATHS, "label": LABELS}), root / "table.parquet")
    return str(root / "table.parquet")


def as_many_files(root: Path) -> str:
    for part, rows in enumerate((slice(0, 2), slice(2, 6))):
        write(root / f"part-{part}.csv", {"image": PATHS[rows], "label": LABELS[rows]})
    return str(root / "part-*.csv")


@pytest.mark.parametrize("kind", [as_csv, as_excel_csv, as_tsv, as_jsonl, as_parquet, as_many_files])
def test_a_table_is_what_the_folder_is(root: Path, kind: Any) -> None:
    folder = opened(str(root))
    found = opened(kind(root))
    assert found.classes == folder.classes == ("ant", "bee")
    assert found.split("train").labels.tolist() == folder.split("train").labels.tolist() == [0] * 3 + [1] * 3
    assert contents(found.split("train")) == contents(folder.split("train")) == [png(row) for row in range(6)]
    assert not found.notes
    if kind is not as_parquet:
        assert list(found.split("train").names) == list(folder.split("train").names)


def test_each_row_of_a_table_of_parts_is_once(root: Path) -> None:
    for name in ("train", "test"):
        rows = slice(0, None, 2) if name == "train" else slice(1, None, 2)
        write(root / f"{name}.csv", {"image": PATHS[rows], "label": LABELS[rows]})
    found = opened(f"{root}/{{split}}.csv")
    assert {name: list(split.names) for name, split in found.splits.items()} == {
        "train": PATHS[::2],
        "test": PATHS[1::2],
    }


def test_a_test_file_without_labels_is_left_out(root: Path) -> None:
    write(root / "train.csv", {"image": PATHS, "label": LABELS})
    write(root / "test.csv", {"image": PATHS})
    found = opened(f"{root}/{{split}}.csv")
    assert list(found.splits) == ["train"]
    assert found.notes == ("left out test: its files have no column label",)


# --- Columns ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("image", "label"),
    [("Image Path", "Class"), ("file_name", "category"), ("id", "breed"), ("id_code", "diagnosis")],
)
def test_columns_are_found_by_their_names_and_said_in_a_line(root: Path, image: str, label: str) -> None:
    source = write(root / "t.csv", {"Unnamed: 0": list(range(6)), image: PATHS, label: LABELS})
    found = opened(source)
    assert found.classes == ("ant", "bee")
    (note,) = found.notes
    assert note == (
        f"columns of {source}: image {image}, label {label}; "
        "if one is wrong, name it, such as --column label=NAME"
    )


def test_columns_are_as_told(root: Path) -> None:
    source = plain(root, genus=["wasp"] * 2 + ["fly"] * 4)
    assert opened(source, label="genus").classes == ("fly", "wasp")
    assert refusal(source, label="genre").endswith(
        "has no column 'genre' (--column label=); it has image, label, genus; did you mean 'genus'?"
    ) or "has no column 'genre' (--column label=)" in refusal(source, label="genre")


def test_advice_on_columns_is_in_the_words_of_who_asked(root: Path) -> None:
    settings = opening({}.get)["columns"]
    source = write(root / "t.csv", {"image": PATHS, "kind": LABELS, "note": list("abcdef")})
    with pytest.raises(VitralError, match="say which with label_column="):
        open_data(source, columns=settings)
    with pytest.raises(VitralError, match="say which with --column label="):
        open_data(source)


def test_columns_of_a_models_training_are_those_of_its_table_alone(root: Path) -> None:
    recorded = Columns.of_metadata({"columns": {"label": "genus", "image_root": "/nowhere"}})
    assert open_data(plain(root), val_fraction=0, columns=recorded).classes == ("ant", "bee")
    assert Columns(label="genus").metadata() == {"columns": {"label": "genus"}}
    assert Columns().metadata() == {}


BAD_TABLES = {
    "no labels": (
        {"image": PATHS, "x": LABELS, "y": LABELS},
        {},
        "has no column label; it has image, x, y; say which",
    ),
    "no images": ({"x": PATHS, "label": LABELS}, {}, "has no column image; it has x, label"),
    "no header": (
        {"ant/0.png": PATHS, "ant": LABELS},
        {},
        "has no column image and label; it has ant/0.png, ant",
    ),
    "two of a name": ({"image": PATHS, "label": LABELS}, {"header": "label,label"}, "has 2 columns 'label'"),
    "no such files": (
        {"image": ["x.png"] * 6, "label": LABELS},
        {},
        "not one of 6 images .*x.png; .* --column image_root=",
    ),
    "addresses": (
        {"image": ["https://e.org/1.png"] * 6, "label": LABELS},
        {},
        "is an address; store the images",
    ),
    "an empty label": (
        {"image": PATHS, "label": [*LABELS[:5], " "]},
        {},
        "each image needs a label, and row 7 has none",
    ),
    "two labels": (
        {"image": [*PATHS, PATHS[1]], "label": [*LABELS, "bee"]},
        {},
        r"the image ant/1.png has two labels, in row 3 and in row 8; .* --column label_delimiter=",
    ),
    "no rows": ({"image": [], "label": []}, {}, "holds no images"),
    "a short row": (
        {"image": ["a"], "label": ["x\n3"]},
        {"raw": "image,label\na\nb,c"},
        "cannot be read as a table",
    ),
    "Latin-1": ({"image": ["a"], "label": ["x"]}, {"bytes": b"image,label\na.png,caf\xe9\n"}, "UTF-?8"),
    "UTF-16": ({"image": ["a"], "label": ["x"]}, {"bytes": "image,label\n".encode("utf-16")}, "UTF-8"),
    "empty": ({"image": ["a"], "label": ["x"]}, {"bytes": b""}, "no first line that names the columns"),
}


@pytest.mark.parametrize(("columns", "change", "text"), BAD_TABLES.values(), ids=BAD_TABLES.keys())
def test_what_cannot_be_meant_is_said_in_a_line(root: Path, columns: Any, change: Any, text: str) -> None:
    file = root / "t.csv"
    source = write(file, columns)
    if "header" in change:
        file.write_text(
            file.read_text().replace("image,label", "image," + change["header"], 1).replace("ant", "ant,a")
        )
    if "raw" in change:
        file.write_text(change["raw"])
    if "bytes" in change:
        file.write_bytes(change["bytes"])
    assert re.search(text, refusal(source))


@pytest.mark.parametrize(
    ("lines", "text"),
    [
        ('[{"image": "a.png", "label": "x"}]', "cannot be read as JSONL, an object a line"),
        ('{"image": "a.png", "label": "x"}\n{"image": "b.png", "label": 3}', "cannot be read as JSONL"),
        ('{"image": 3, "label": "x"}', "the images of 'image' are int64; they must be paths"),
        ("{", "cannot be read as JSONL"),
    ],
)
def test_lines_that_are_no_objects_of_a_kind(root: Path, lines: str, text: str) -> None:
    (root / "t.jsonl").write_text(lines)
    assert text in refusal(str(root / "t.jsonl"))


# --- Paths -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["absolute", "backslashes", "home", "no suffix", "image_root", "spaces"])
def test_every_way_to_name_a_picture(root: Path, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir("/")
    monkeypatch.setenv("HOME", str(root))
    file, told = root / "t.csv", {}
    match form:
        case "absolute":
            paths = [str(root / path) for path in PATHS]
        case "backslashes":
            paths = [path.replace("/", "\\") for path in PATHS]
        case "home":
            paths = [f"~/{path}" for path in PATHS]
        case "no suffix":
            paths = [path.removesuffix(".png") for path in PATHS]
        case "image_root":
            file, paths, told = root / "lists" / "t.csv", PATHS, {"image_root": str(root)}
            file.parent.mkdir()
        case _:
            paths = [f" {path} " for path in PATHS]
    found = opened(write(file, {"image": paths, "label": LABELS}), **told)
    assert contents(found.split("train")) == [png(row) for row in range(6)]


def test_a_missing_picture_is_a_damaged_one(root: Path) -> None:
    source = write(root / "t.csv", {"image": [*PATHS[:5], ""], "label": LABELS})
    (root / PATHS[1]).unlink()
    images = opened(source).split("train").images
    assert not images[1].exists()  # pyrefly: ignore[missing-attribute]
    with pytest.raises(ImageError, match="its cell is empty"):
        images[5]


# --- Labels ----------------------------------------------------------------------------------------


def test_007_stays_text(root: Path) -> None:
    source = write(root / "t.csv", {"image": PATHS, "label": ["007", "7", "07", "7", "1e3", "NA"]})
    assert opened(source).classes == ("007", "07", "1e3", "7", "NA")


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_several_labels_in_a_cell(root: Path, kind: str) -> None:
    cells = ["red| blue", "red", "", "green|red|", "blue", " "]
    source = write(root / "t.csv", {"image": PATHS, "labels": cells})
    if kind == "jsonl":
        words = [[word.strip() for word in cell.split("|") if word.strip()] for cell in cells]
        rows = (json.dumps({"image": path, "labels": row}) for path, row in zip(PATHS, words, strict=True))
        (root / "t.jsonl").write_text("\n".join(rows))
        source = str(root / "t.jsonl")
    found = opened(source, **({"label_delimiter": "|"} if kind == "csv" else {}))
    assert found.classes == ("blue", "green", "red")
    expected = [[1, 0, 1], [0, 0, 1], [0, 0, 0], [0, 1, 1], [1, 0, 0], [0, 0, 0]]
    assert found.split("train").labels.astype(int).tolist() == expected


def test_columns_of_0_and_1_are_a_class_each(root: Path) -> None:
    source = write(root / "t.csv", {"image": PATHS, "wet": [1, 0, 1, 0, 1, 0], "cold": [1, 1, 0, 0, 1, 0]})
    found = opened(source)
    assert found.classes == ("cold", "wet")
    rows = [[1, 1], [1, 0], [0, 1], [0, 0], [1, 1], [0, 0]]
    assert found.split("train").labels.astype(int).tolist() == rows
    assert found.notes[0].startswith(f"columns of {source}: image image, label wet, cold;")
    assert opened(source, label="wet,cold").split("train").labels.astype(int).tolist() == rows


def test_columns_of_0_and_1_with_one_class_an_image_are_its_label(root: Path) -> None:
    source = write(root / "t.csv", {"image": PATHS, "b": ["1.0", "0.0"] * 3, "a": ["0.0", "1.0"] * 3})
    found = opened(source)
    assert found.classes == ("a", "b")
    assert found.split("train").labels.tolist() == [1, 0] * 3


def test_other_numbers_are_no_classes_columns(root: Path) -> None:
    source = write(root / "t.csv", {"image": PATHS, "a": [0, 1, 2] * 2, "b": [0, 1, 0] * 2})
    assert "'a' is to be a class's column, and holds other than 0 and 1" in refusal(source, label="a,b")
    assert "has no column label" in refusal(source)


# --- Splits and groups -----------------------------------------------------------------------------


def test_a_column_says_the_split(root: Path) -> None:
    source = plain(root, split=["train", "Test", "valid", "training", "test", "validation"])
    found = opened(source)
    named = {name: list(split.names) for name, split in found.splits.items()}
    assert named == {
        "train": [PATHS[0], PATHS[3]], "val": [PATHS[2], PATHS[5]], "test": [PATHS[1], PATHS[4]]
    }  # fmt: skip
    assert found.split("test").labels.tolist() == [0, 1]
    assert contents(found.split("val")) == [png(2), png(5)]


def test_is_valid_says_it_too(root: Path) -> None:
    found = opened(plain(root, is_valid=["True", "False", "False"] * 2), split="is_valid")
    assert [len(split) for split in found.splits.values()] == [4, 2]


def test_a_column_that_is_no_split(root: Path) -> None:
    source = plain(root, set=["a", "b", "a", "b", "a", "b"])
    found = opened(source)
    assert list(found.splits) == ["train"]
    assert any("the column 'set' holds a, b, which is no split" in note for note in found.notes)
    assert "the column 'set' holds 'a' in row 2; a split is train, val or test" in refusal(
        source, split="set"
    )


def test_a_group_in_two_splits_is_refused_if_named_and_told_if_found(root: Path) -> None:
    splits = ["train", "val", "train"] * 2
    source = plain(root, split=splits, patient=["p", "q", "r", "s", "p", "t"])
    text = "1 of 'patient' stand in two splits, such as 'p' in train (row 2) and in val (row 6)"
    assert text in refusal(source, group="patient")
    assert any(text in note for note in opened(source).notes)
    sound = plain(root, split=splits, patient=["p", "q", "r", "s", "u", "p"])
    assert opened(sound, group="patient").split("val").groups is not None


@pytest.mark.parametrize("multi_label", [False, True])
@pytest.mark.parametrize("seed", range(5))
def test_groups_are_held_out_whole(seed: int, multi_label: bool) -> None:
    """As near to the share as the groups allow: beside scikit-learn's division of single labels."""
    draw = np.random.default_rng(seed)
    groups = np.repeat(np.arange(120), draw.integers(1, 12, 120))
    labels = draw.choice(5, len(groups), p=[0.4, 0.3, 0.15, 0.1, 0.05])
    if multi_label:
        labels = draw.random((len(groups), 5)) < [0.5, 0.3, 0.2, 0.1, 0.05]
    split = Split([png(0)] * len(groups), labels, [str(row) for row in range(len(groups))], groups)
    train, val = hold_out(split, 0.2, seed)
    assert not {*train.groups.tolist()} & {*val.groups.tolist()}  # pyrefly: ignore
    assert sorted([*train.names, *val.names], key=int) == list(split.names)
    counts = [
        part.labels.sum(0) if multi_label else np.bincount(part.labels, minlength=5) for part in (train, val)
    ]
    ours = np.abs(counts[1] / (counts[0] + counts[1]) - 0.2).max()
    assert ours < 0.06
    if not multi_label:
        kept = StratifiedGroupKFold(5, shuffle=True, random_state=seed)
        _, theirs = next(iter(kept.split(labels, labels, groups)))
        whole = np.bincount(labels, minlength=5)
        assert ours <= np.abs(np.bincount(labels[theirs], minlength=5) / whole - 0.2).max() + 0.05


def test_groups_of_a_table_stay_together(root: Path) -> None:
    source = plain(root, patient=["p", "p", "q", "r", "r", ""])
    data = open_data(source, val_fraction=0.3)
    train, val = data.split("train"), data.split("val")
    assert len(train) + len(val) == 6
    assert not {*train.groups.tolist()} & {*val.groups.tolist()}  # pyrefly: ignore
    assert ({*PATHS[:2]} <= {*train.names}) != ({*PATHS[:2]} <= {*val.names})


def test_a_class_of_one_group_stays_with_what_is_learnt_from(root: Path) -> None:
    with pytest.raises(VitralError, match="no group of images can be held out"):
        open_data(plain(root, group=["p"] * 3 + ["q"] * 3))


def test_a_model_remembers_the_columns_of_its_training(root: Path) -> None:
    """Without them neither its labels nor the images that it held out could be found again."""
    for number in range(6, 40):
        (root / f"{number}.png").write_bytes(png(number))
    paths = [*PATHS, *(f"{number}.png" for number in range(6, 40))]
    columns = {
        "image": paths,
        "species": ["ant", "bee"] * 20,
        "place": ["field", "wood", "hill", "hill"] * 10,
        "nest": [number // 3 for number in range(40)],
    }
    source = write(root / "table.csv", columns)
    told: dict[str, Any] = {"label_column": "species", "group_column": "nest"}
    tiny = {"patch_size": 8, "embed_dim": 16, "num_layers": 1, "num_heads": 2}
    how: dict[str, Any] = {"model": "ViT-Ti/16", "architecture": tiny, "img_size": 16, "batch_size": 8}
    how |= {"workers": 0, "device": "cpu", "eval_epochs": 1}
    train(source, root / "run", **told, **how, epochs=1, keep_state=True)
    assert train(source, root / "run", resume=True, epochs=2).finished
    classifier, warned = load(root / "run"), []
    name, split = choose_split(classifier, source, None, warned.append)
    assert name == "val"
    assert not warned
    groups = open_data(source, columns=Columns(label="species", group="nest")).split("val")
    assert list(split.names) == list(groups.names)
    assert classifier.labels == ("ant", "bee")


# --- Images alone ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [as_csv, as_tsv, as_jsonl, as_parquet, as_many_files, str])
def test_images_without_labels(root: Path, kind: Any) -> None:
    found = find_unlabelled(kind(root))
    assert len(found) == len(found.images) == 6
    assert [found.images[row].read_bytes() for row in range(6)] == [png(row) for row in range(6)]  # pyrefly: ignore
    if kind is str:
        assert list(found.names) == [f"{root}/{path}" for path in PATHS]


def test_no_labels_are_asked_for(root: Path) -> None:
    source = write(root / "test.csv", {"path": [path.removesuffix(".png") for path in PATHS]})
    found = find_unlabelled(source)
    assert [found.images[row] for row in range(6)] == [root / path for path in PATHS]
    assert found.notes[0].startswith(f"columns of {source}: image path; if one is wrong")
    assert len(find_unlabelled(f"{root}/{{split}}.csv")) == 6
    assert len(find_unlabelled(str(root / PATHS[0]))) == 1
    assert len(find_unlabelled("digits")) == 1797


def test_rows_that_repeat_an_image_are_told(root: Path) -> None:
    source = write(root / "t.csv", {"image": [*PATHS, "./" + PATHS[0]], "label": [*LABELS, "ant"]})
    assert opened(source).notes == (
        f"{source}: 1 rows name an image that an earlier row names, with the same label",
    )
    assert Counter(opened(source).split("train").labels.tolist()) == {0: 4, 1: 3}
