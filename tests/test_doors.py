"""One data set through every door: the same classes and splits, and the same weights to the bit."""

import csv
import hashlib
import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from torchvision.datasets import ImageFolder

from tests.data_hub import data_hub
from vitral.data.image_data import DataSource, ImageData, open_data
from vitral.reports.train import train

CLASSES = ("ant", "bee", "cat")
SPLITS = {"train": 8, "val": 3, "test": 2}  # images of each class
Rows = list[tuple[Path, str, str]]  # picture, class, split
STEPS = 20


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pictures(tmp_path_factory.mktemp("doors"))


def pictures(folder: Path) -> Path:
    """The images as a folder, within one that all doors are made in."""
    draw = np.random.default_rng(0)
    for split, count in SPLITS.items():
        for place, name in enumerate(CLASSES):
            for number in range(count):
                file = folder / "pictures" / split / name / f"{number}.png"
                file.parent.mkdir(parents=True, exist_ok=True)
                pixels = draw.integers(0, 120, (24, 20 + number, 3)).astype(np.uint8)
                pixels[..., place] += 100
                Image.fromarray(pixels).save(file)
    return folder


def rows(root: Path) -> Rows:
    files = [(split, path) for split in SPLITS for path in sorted((root / "pictures" / split).glob("*/*"))]
    return [(path, path.parent.name, split) for split, path in files]


def folder(root: Path) -> DataSource:
    return root / "pictures"


def dataset(root: Path) -> DataSource:
    parts = {split: ImageFolder(str(root / "pictures" / split)) for split in SPLITS}
    return ImageData.from_dataset(parts["train"], parts["val"])


def delimited(root: Path, name: str, delimiter: str) -> DataSource:
    with (root / name).open("w", newline="") as file:
        table = csv.writer(file, delimiter=delimiter)
        table.writerow(["image", "label", "split"])
        table.writerows((path.relative_to(root), label, split) for path, label, split in rows(root))
    return root / name


def comma_separated(root: Path) -> DataSource:
    return delimited(root, "table.csv", ",")


def tab_separated(root: Path) -> DataSource:
    return delimited(root, "table.tsv", "\t")


def binary_columns(root: Path) -> DataSource:
    """A column of 0 and 1 a class."""
    with (root / "binary.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["image", "split", *CLASSES])
        for path, label, split in rows(root):
            table.writerow([path.relative_to(root), split, *(int(label == name) for name in CLASSES)])
    return root / "binary.csv"


def json_lines(root: Path) -> DataSource:
    lines = [json.dumps({"image": str(p), "label": label, "split": split}) for p, label, split in rows(root)]
    (root / "table.jsonl").write_text("\n".join(lines))
    return root / "table.jsonl"


def parquet(root: Path) -> DataSource:
    """A file a split, but for the training images, which are in two, and in small row groups."""
    for split in SPLITS:
        of_split = [(path, label) for path, label, of in rows(root) if of == split]
        parts = [of_split[:10], of_split[10:]] if split == "train" else [of_split]
        for number, part in enumerate(parts):
            images = [{"bytes": path.read_bytes(), "path": path.name} for path, _ in part]
            table = pa.table({"image": images, "label": [CLASSES.index(label) for _, label in part]})
            feature = {"label": {"names": list(CLASSES), "_type": "ClassLabel"}}
            metadata = {"huggingface": json.dumps({"info": {"features": feature}})}
            file = root / f"{split}-{number}.parquet"
            pq.write_table(table.replace_schema_metadata(metadata), file, row_group_size=4)
    return f"{root}/{{split}}-*.parquet"


def shards(root: Path) -> DataSource:
    for split in SPLITS:
        of_split = [(path, label) for path, label, of in rows(root) if of == split]
        half = len(of_split) // 2
        for number, part in enumerate((of_split[:half], of_split[half:])):
            with tarfile.open(root / f"{split}-{number:03}.tar", "w") as tar:
                for row, (path, label) in enumerate(part):
                    for name, content in (("png", path.read_bytes()), ("cls", label.encode())):
                        member = tarfile.TarInfo(f"{row:04}.{name}")
                        member.size = len(content)
                        tar.addfile(member, io.BytesIO(content))
    return f"{root}/{{split}}-{{000..001}}.tar"


def hub_files(root: Path) -> dict[str, bytes]:
    parquet(root)
    return {f"data/{file.name}": file.read_bytes() for file in sorted(root.glob("*.parquet"))}


def hub(_: Path) -> DataSource:
    return "hf://datasets/org/name"


def hub_stream(_: Path) -> DataSource:
    return "hf-stream://datasets/org/name"


DOORS: list[Callable[[Path], DataSource]] = [
    folder, comma_separated, tab_separated, binary_columns, json_lines, parquet, shards, hub, hub_stream,
    dataset,
]  # fmt: skip


def weights(data: DataSource, out: Path) -> str:
    tiny = {"patch_size": 8, "embed_dim": 16, "num_layers": 2, "num_heads": 2}
    train(
        data, out, model="ViT-Ti/16", architecture=tiny, img_size=16, steps=STEPS, batch_size=8, workers=0,
        device="cpu", precision="float32", compile=False, crop="resized", flip=True, threads=1,
    )  # fmt: skip
    return hashlib.sha256((out / "last" / "model.safetensors").read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def expected(root: Path) -> str:
    return weights(folder(root), root / "run-folder")


@pytest.mark.parametrize("door", DOORS, ids=lambda door: door.__name__)
def test_the_same_classes_splits_and_bits(
    root: Path,
    door: Callable[[Path], DataSource],
    expected: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with data_hub(hub_files(root), tmp_path / "hub", monkeypatch):
        enter(root, door, expected, tmp_path)


def enter(root: Path, door: Callable[[Path], DataSource], expected: str, tmp_path: Path) -> None:
    source = door(root)
    data = open_data(source)
    assert data.classes == CLASSES
    assert not data.held_out
    for name, count in SPLITS.items():
        if name == "test" and door is dataset:  # a test set is none of `from_dataset`'s
            continue
        assert data.split(name).labels.tolist() == [place for place in range(3) for _ in range(count)]
    assert weights(source, tmp_path / "run") == expected


def test_rows_in_another_order_are_another_run(root: Path, expected: str, tmp_path: Path) -> None:
    lines = (Path(str(comma_separated(root)))).read_text().splitlines()
    (root / "reversed.csv").write_text("\n".join([lines[0], *reversed(lines[1:])]))
    assert weights(root / "reversed.csv", tmp_path / "run") != expected
