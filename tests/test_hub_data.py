"""Datasets of a small hub on this machine: mapped and streamed alike, and what is fetched for it."""

import io
import json
import pickle
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from tests.data_hub import COMMIT, DataHub, data_hub
from tests.test_shards import png
from vitral.data.image_data import open_data
from vitral.data.loader import Loader
from vitral.data.sources import find, find_unlabelled
from vitral.data.workers import Loading
from vitral.images.picture import open_image
from vitral.runtime.errors import VitralError

GROUP_BYTES = 26_000  # of a row group of four images, the statistics of its pages included; two have more
NAMES = {b"huggingface": json.dumps({"info": {"features": {"label": {"names": ["dog", "ant"]}}}}).encode()}


def parquet(first: int, rows: int, metadata: Any = NAMES, row_group_size: int = 4) -> bytes:
    """Image `i` is of grey `i`, and noise makes row groups large beside their footers."""
    noise = np.random.default_rng(first)
    images = [
        {"bytes": png(row) + noise.bytes(4000), "path": f"{row}.png"} for row in range(first, first + rows)
    ]
    table = pa.table({"image": images, "label": [row % 2 for row in range(first, first + rows)]})
    buffer = io.BytesIO()
    pq.write_table(table.replace_schema_metadata(metadata), buffer, row_group_size=row_group_size)
    return buffer.getvalue()


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[type[DataHub]]:
    files = {
        "README.md": b"",
        "data/train-00000-of-00002.parquet": parquet(0, 20),
        "data/train-00001-of-00002.parquet": parquet(20, 12),
        "data/validation-00000-of-00001.parquet": parquet(32, 6),
    }
    with data_hub(files, tmp_path / "hub", monkeypatch) as running:
        yield running


def bytes_of(split: Any) -> list[bytes]:
    return [split.images[row] for row in range(len(split))]


def test_mapped_and_streamed_are_the_files_themselves(server: type[DataHub], tmp_path: Path) -> None:
    for file, content in server.revisions["org/name@main"].items():
        if file.endswith(".parquet"):
            (tmp_path / Path(file).name).write_bytes(content)
    local = open_data(f"{tmp_path}/{{split}}-*.parquet", val_fraction=0)
    for way in ("hf", "hf-stream"):
        found = open_data(f"{way}://datasets/org/name", val_fraction=0)
        assert found.classes == local.classes == ("dog", "ant")
        for name in ("train", "val"):
            ours, theirs = found.split(name), local.split(name)
            assert list(ours.names) == list(theirs.names)
            np.testing.assert_array_equal(ours.labels, theirs.labels)
            assert bytes_of(ours) == bytes_of(theirs)


def test_images_without_labels(server: type[DataHub]) -> None:
    found = find_unlabelled("hf-stream://datasets/org/name")
    assert len(found) == 38
    assert found.images[37] == find("hf://datasets/org/name").splits["val"].images[5]


def test_streaming_fetches_what_is_read_and_once(server: type[DataHub]) -> None:
    train = find("hf-stream://datasets/org/name").splits["train"]
    # A footer is sought in the last 64 KiB of a file; of labels there are a hundred bytes a row group.
    assert sum(server.sent.values()) <= 3 * 65_536 + 10 * 128
    server.sent.clear()
    first = [train.images[row] for row in (5, 4, 7)]  # of one row group
    assert 16_000 < sum(server.sent.values()) < GROUP_BYTES
    server.sent.clear()
    again = pickle.loads(pickle.dumps(train.images))  # as in another process
    assert [again[row] for row in (5, 4, 7)] == first
    assert not server.sent


def test_threads_that_want_one_group_fetch_it_once(server: type[DataHub]) -> None:
    train = find("hf-stream://datasets/org/name").splits["train"]
    copies = [pickle.loads(pickle.dumps(train.images)) for _ in range(4)]
    server.sent.clear()
    with ThreadPoolExecutor(4) as pool:
        assert len(set(pool.map(lambda images: images[9], copies))) == 1
    assert 16_000 < sum(server.sent.values()) < GROUP_BYTES


def test_workers_stream_the_same_batches(server: type[DataHub]) -> None:
    split = find("hf-stream://datasets/org/name").splits["train"]

    def labels(workers: int) -> list[list[int]]:
        loader = Loader(split, as_tensor, Loading(workers))
        return [batch.labels.tolist() for batch in loader.evaluation_batches(8)]

    assert labels(2) == labels(0) == [[0, 1] * 4] * 4


def as_tensor(image: Any) -> torch.Tensor:
    return torch.from_numpy(np.array(open_image(image)))


def test_what_was_read_once_needs_no_connection(
    server: type[DataHub], monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    expected = {
        way: bytes_of(find(f"{way}://datasets/org/name").splits["train"]) for way in ("hf", "hf-stream")
    }
    server.asked.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    for way, images in expected.items():
        assert bytes_of(find(f"{way}://datasets/org/name").splits["train"]) == images
    with pytest.raises(VitralError, match=r"org/other is not in the cache, and the hub is out of reach"):
        find("hf://datasets/org/other")
    assert not server.asked


def test_a_commit_is_not_asked_for_again(server: type[DataHub]) -> None:
    source = f"hf://datasets/org/name@{COMMIT}"
    find(source)
    server.asked.clear()
    assert len(find(source).splits["train"]) == 32
    assert not server.asked


def test_configurations_by_folders_and_by_the_card(server: type[DataHub]) -> None:
    server.revisions["org/name@main"] = {
        f"{config}/{split}-0.parquet": parquet(first, 8)
        for config, first in (("en", 0), ("fr", 100))
        for split in ("train", "test")
    }
    with pytest.raises(VitralError, match=r"has the configurations en, fr; say which, as in .*org/name:en"):
        find("hf://datasets/org/name")
    with pytest.raises(VitralError, match=r"has no configuration 'de'; it has en, fr"):
        find("hf://datasets/org/name:de")
    fr = find("hf://datasets/org/name:fr")
    assert {name: len(split) for name, split in fr.splits.items()} == {"train": 8, "test": 8}
    server.card = {
        "configs": [
            {"config_name": "a", "data_files": [{"split": "train", "path": "en/*"}]},
            {"config_name": "b", "default": True, "data_files": [{"split": "train", "path": ["fr/train-*"]}]},
        ]
    }
    chosen = find("hf://datasets/org/name@main").splits
    assert bytes_of(chosen["train"]) == bytes_of(fr.splits["train"])
    assert list(chosen) == ["train"]
    assert len(find("hf://datasets/org/name:a").splits["train"]) == 16


def test_the_card_names_classes_that_the_files_do_not(server: type[DataHub]) -> None:
    server.revisions["org/name@main"] = {"train.parquet": parquet(0, 8, metadata=None)}
    label = {"name": "label", "dtype": {"class_label": {"names": {"1": "cat", "0": "owl"}}}}
    server.card = {"dataset_info": {"features": [{"name": "image", "dtype": "image"}, label]}}
    assert find("hf-stream://datasets/org/name").classes == ("owl", "cat")


def test_the_hubs_own_conversion_is_read_where_there_is_no_parquet(server: type[DataHub]) -> None:
    server.revisions["org/name@main"] = {"images/0.jpg": b"", "data.zip": b""}
    with pytest.raises(
        VitralError, match=r"has no parquet files to train on; its files are data.zip, images/0.jpg"
    ):
        find("hf://datasets/org/name")
    server.revisions["org/name@refs/convert/parquet"] = {"default/train/0000.parquet": parquet(0, 8)}
    server.revisions[f"org/name@{'c' * 40}"] = server.revisions["org/name@refs/convert/parquet"]
    for way in ("hf", "hf-stream"):
        assert len(find(f"{way}://datasets/org/name").splits["train"]) == 8


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("hf://datasets/org/gone", r"org/gone is not on the hub, or private"),
        ("hf://datasets/org/gated", r"org/gated is gated: accept its terms on its page"),
        ("hf://datasets/org/name@v9", r"org/name@v9 is not there in that revision"),
        ("hf://org/name", r"does not name a dataset on the hub; write hf://datasets/org/name"),
        ("hf-stream://datasets/name", r"does not name a dataset on the hub"),
    ],
)
def test_what_cannot_be_had(server: type[DataHub], source: str, text: str) -> None:
    with pytest.raises(VitralError, match=text) as caught:
        open_data(source)
    assert "\n" not in str(caught.value)


def test_a_hub_that_fails_while_images_are_fetched_is_no_damage(server: type[DataHub]) -> None:
    """Images that were not fetched are not skipped as damaged: the run stops with a line, and can go on."""
    train = find("hf-stream://datasets/org/name").splits["train"]
    server.failing = 404
    with pytest.raises(VitralError, match="hf://datasets/org/name") as caught:
        list(Loader(train, as_tensor).evaluation_batches(8))
    assert "\n" not in str(caught.value)
    server.failing = 0
    assert len(list(Loader(train, as_tensor).evaluation_batches(8))) == 4
