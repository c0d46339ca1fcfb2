"""WebDataset shards against webdataset's own reading, and each of its traps."""

import io
import json
import os
import pickle
import sys
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.conftest import write_images
from vitral.data.columns import Columns
from vitral.data.image_data import open_data
from vitral.data.sources import find, find_unlabelled, tar_index
from vitral.data.sources.fetched import FetchedFiles
from vitral.data.sources.shards import with_braces
from vitral.images.picture import open_image
from vitral.runtime.errors import VitralError


def png(grey: int, size: tuple[int, int] = (3, 2)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, (grey, grey, grey)).save(buffer, "PNG")
    return buffer.getvalue()


def write_shard(
    path: Path, members: Sequence[tuple[str, bytes]] | Mapping[str, bytes], **options: Any
) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", **options) as archive:
        for name, content in members.items() if isinstance(members, Mapping) else members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return str(path)


def samples(first: int, count: int, classes: int = 2) -> dict[str, bytes]:
    found = {}
    for number in range(first, first + count):
        found |= {f"{number:05}.png": png(number), f"{number:05}.cls": str(number % classes).encode()}
    return found


def greys(split: Any) -> list[int]:
    return [int(open_image(image).getpixel((0, 0))[0]) for image in split.images]  # type: ignore[index]


def refused(source: str | Path, text: str, **columns: Any) -> None:
    with pytest.raises(VitralError, match=text) as caught:
        find(str(source), Columns(**columns))
    assert "\n" not in str(caught.value)


def test_shards_in_order(tmp_path: Path) -> None:
    for number in range(3):
        write_shard(tmp_path / f"train-{number:03}.tar", samples(4 * number, 4))
    for source in ("train-{000..002}.tar", "train-*.tar", "train-{000..001}.tar::DIR/train-002.tar"):
        found = open_data(f"{tmp_path}/{source.replace('DIR', str(tmp_path))}", val_fraction=0)
        train = found.split("train")
        assert found.classes == ("0", "1")
        assert greys(train) == list(range(12))
        assert train.labels.tolist() == [0, 1] * 6
        assert list(train.names[:2]) == ["00000.png", "00001.png"]
        assert train.blocks is not None
        assert train.blocks.of_row.tolist() == [0] * 4 + [1] * 4 + [2] * 4


@pytest.mark.parametrize(("file", "split"), [("validation", "val"), ("val", "val"), ("test", "test")])
def test_split_in_the_pattern_finds_each_spelling(tmp_path: Path, file: str, split: str) -> None:
    write_shard(tmp_path / "train-0.tar", samples(0, 6))
    write_shard(tmp_path / f"{file}-0.tar", samples(6, 2))
    found = open_data(f"{tmp_path}/{{split}}-*.tar", val_fraction=0)
    assert {name: len(part) for name, part in found.splits.items()} == {"train": 6, split: 2}


def test_samples_are_those_that_webdataset_reads(tmp_path: Path) -> None:
    """Names with folders and dots, upper case, members that say nothing, long names, in three formats."""
    theirs = pytest.importorskip("webdataset.tariterators")
    long = "folder-" + "x" * 120
    members = [
        ("__index__/ignored.txt", b"x"), ("./a/0.PNG", png(1)), ("./a/0.cls", b"1"), ("b.c/0.png", png(2)),
        ("b.c/0.cls", b"0"), ("README", b"x"), (".hidden.png", png(9)), ("1.seg.png", png(8)),
        ("1.png", png(3)), ("1.cls", b"1"), (f"{long}/2.png", png(4)), (f"{long}/2.cls", b"0"),
        ("é.png", png(5)), ("é.cls", b"0"), ("__meta__.png", png(7)),
    ]  # fmt: skip
    for number, archive in enumerate((tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)):
        kept = members if archive != tarfile.USTAR_FORMAT else [m for m in members if m[0].isascii()]
        path = write_shard(tmp_path / f"{number}.tar", kept, format=archive)
        with Path(path).open("rb") as stream:
            files = theirs.tar_file_expander([{"url": path, "stream": stream}])
            read = list(theirs.group_by_keys(files))
        expected = [(sample["png"], int(sample["cls"])) for sample in read if "cls" in sample]
        train = find(path).splits["train"]
        ours = [(train.images[row], int(train.labels[row])) for row in range(len(train))]
        assert ours == expected
        assert len(expected) >= 4


def test_braces_are_expanded_as_by_braceexpand() -> None:
    braceexpand = pytest.importorskip("braceexpand").braceexpand
    for pattern in ("a-{000..012}.tar", "{0..3}/{08..11}.tar", "a.tar", "{9..11}-{1..2}x", "{00..3}"):
        assert with_braces(pattern) == list(braceexpand(pattern))


@pytest.mark.parametrize(
    ("labels", "classes", "indices"),
    [
        ({"json": ['{"label": "dog"}', '{"label": "ant"}', '{"label": "dog"}']}, ("ant", "dog"), [1, 0, 1]),
        ({"json": ['{"label": 3}', '{"label": 1}', '{"label": 3}']}, ("1", "3"), [1, 0, 1]),
        ({"txt": ["dog\n", "ant", "dog"]}, ("ant", "dog"), [1, 0, 1]),
        ({"cls": ["10", "2", "10"]}, ("2", "10"), [1, 0, 1]),
        ({"cls": ["007", "08", "007"]}, ("007", "08"), [0, 1, 0]),
        ({"cls": ["1", "0", "1"], "txt": ["a", "long", "caption"]}, ("0", "1"), [1, 0, 1]),
    ],
)
def test_what_says_the_label(
    tmp_path: Path, labels: dict[str, list[str]], classes: tuple[str, ...], indices: list[int]
) -> None:
    members = {}
    for row in range(3):
        members[f"{row}.png"] = png(row)
        members |= {f"{row}.{name}": texts[row].encode() for name, texts in labels.items()}
    found = find(write_shard(tmp_path / "a.tar", members))
    assert found.classes == classes
    assert found.splits["train"].labels.tolist() == indices


def test_several_labels_an_image(tmp_path: Path) -> None:
    rows = [["ant", "bee"], [], ["bee"]]
    members = {}
    for row, shown in enumerate(rows):
        members |= {f"{row}.png": png(row), f"{row}.json": json.dumps({"labels": shown}).encode()}
    found = find(write_shard(tmp_path / "a.tar", members))
    assert found.classes == ("ant", "bee")
    assert found.splits["train"].labels.astype(int).tolist() == [[1, 1], [0, 0], [0, 1]]


def test_which_field_and_key_may_be_said(tmp_path: Path) -> None:
    members = {}
    for row in range(4):
        said = {"breed": "ab"[row % 2], "label": "x"}
        members |= {f"{row}.left.png": png(row), f"{row}.right.png": png(100 + row)}
        members[f"{row}.json"] = json.dumps(said).encode()
    source = write_shard(tmp_path / "a.tar", members)
    refused(source, "fields left.png, right.png; say which with --column image=")
    found = find(source, Columns(image="right.png", label="breed"))
    assert greys(found.splits["train"]) == [100, 101, 102, 103]
    assert found.classes == ("a", "b")
    refused(
        source,
        "json of 0.right.png has no key 'colour'; it has breed, label",
        image="right.png",
        label="colour",
    )
    refused(source, "no field of images 'jpg'; it has left.png, right.png", image="jpg")


def test_a_packed_image_folder_has_the_folders_names_and_classes(tmp_path: Path) -> None:
    """And so the same images are held out."""
    folder = write_images(tmp_path / "images", {"ant": 9, "bee": 9})
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for file in sorted(folder.rglob("*.png")):
            archive.add(file, file.relative_to(folder).as_posix())
    packed, plain = open_data(tmp_path / "a.tar"), open_data(folder)
    assert packed.classes == plain.classes
    for name in ("train", "val"):
        assert list(packed.split(name).names) == list(plain.split(name).names)
        np.testing.assert_array_equal(packed.split(name).labels, plain.split(name).labels)
        for row in range(len(plain.split(name))):
            path = plain.split(name).images[row]
            assert isinstance(path, Path)
            assert packed.split(name).images[row] == path.read_bytes()


def test_images_without_labels(tmp_path: Path) -> None:
    write_shard(tmp_path / "train-0.tar", {"a.png": png(1), "b.png": png(2)})
    write_shard(tmp_path / "test-0.tar", {"c.png": png(3), "c.cls": b"0", "d.json": b"{}"})
    found = find_unlabelled(f"{tmp_path}/{{split}}-*.tar")
    assert list(found.names) == ["a.png", "b.png", "c.png"]
    assert [found.images[row] for row in range(3)] == [png(1), png(2), png(3)]


# --- The index -----------------------------------------------------------------------------------------


def count_scans(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    scanned: list[str] = []
    scan = tar_index.scan

    def counting(file: Path, shown: str) -> Any:
        scanned.append(file.name)
        return scan(file, shown)

    monkeypatch.setattr(tar_index, "scan", counting)
    return scanned


def test_a_shard_is_read_once_and_again_when_it_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scanned = count_scans(monkeypatch)
    source = write_shard(tmp_path / "a.tar", samples(0, 4))
    first, again = find(source).splits["train"], find(source).splits["train"]
    assert scanned == ["a.tar"]
    assert greys(first) == greys(again) == [0, 1, 2, 3]
    assert [file.name for file in tmp_path.iterdir() if file.suffix == ".index"] == [".a.tar.index"]
    write_shard(tmp_path / "a.tar", samples(10, 6))
    os.utime(tmp_path / "a.tar", (1, 1))
    assert greys(find(source).splits["train"]) == [10, 11, 12, 13, 14, 15]
    (tmp_path / ".a.tar.index").write_bytes(b"damaged")
    assert len(find(source).splits["train"]) == 6
    assert scanned == ["a.tar"] * 3


def test_the_index_of_a_folder_that_may_not_be_written_lies_in_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scanned = count_scans(monkeypatch)
    source = write_shard(tmp_path / "shards" / "a.tar", samples(0, 4))
    write = tar_index.write_atomically

    def refusing(path: Path, content: bytes) -> None:
        if path.parent.name == "shards" and path.name.startswith("."):
            raise PermissionError(13, "Permission denied", str(path))
        write(path, content)

    monkeypatch.setattr(tar_index, "write_atomically", refusing)
    assert len(find(source).splits["train"]) == len(find(source).splits["train"]) == 4
    assert scanned == ["a.tar"]
    assert os.listdir(tmp_path / "shards") == ["a.tar"]


def test_images_are_read_after_pickling_and_after_the_shard_is_gone(tmp_path: Path) -> None:
    source = Path(write_shard(tmp_path / "a.tar", samples(0, 4)))
    images = find(str(source)).splits["train"].images
    copy = pickle.loads(pickle.dumps(images))
    assert [copy[row] for row in range(4)] == [images[row] for row in range(4)]
    with source.open("rb+") as file:
        file.truncate(600)
    with pytest.raises(VitralError, match=r"a.tar was cut off since it was read first"):
        images[3]
    source.unlink()
    with pytest.raises(VitralError, match=r"its shard .*a.tar cannot be opened: No such file"):
        pickle.loads(pickle.dumps(images))[0]


# --- Traps ---------------------------------------------------------------------------------------------


def test_a_field_that_comes_twice(tmp_path: Path) -> None:
    members = [("a.png", png(0)), ("a.cls", b"0"), ("a.png", png(1))]
    refused(write_shard(tmp_path / "a.tar", members), "the sample a has two members 'png'")


def test_two_images_of_a_sample(tmp_path: Path) -> None:
    members = {"a.png": png(0), "a.bmp": png(1), "a.cls": b"0"}
    refused(write_shard(tmp_path / "a.tar", members), "has two images, of the fields png, bmp; say which")


def test_names_with_dots(tmp_path: Path) -> None:
    members = {f"img.{row:03}.png": png(row) for row in range(40)}
    refused(write_shard(tmp_path / "a.tar", members), "a field is all after the first dot of a name")


def test_a_sample_without_its_label_or_its_image(tmp_path: Path) -> None:
    refused(
        write_shard(tmp_path / "a.tar", {**samples(0, 2), "x.png": png(3)}),
        "a.tar: x.png has no label, as others have in cls",
    )
    found = find(write_shard(tmp_path / "b.tar", {**samples(0, 2), "x.cls": b"1"}))
    assert "left out 1 samples without an image" in found.notes
    refused(write_shard(tmp_path / "c.tar", {"a.png": png(3)}), "c.tar: a.png has no label; beside it")
    refused(write_shard(tmp_path / "d.tar", {"a.cls": b"1"}), "d.tar holds no images")
    refused(write_shard(tmp_path / "e.tar", {}), "e.tar holds no images")


def test_captions_are_no_labels(tmp_path: Path) -> None:
    members = {}
    for row in range(20):
        members |= {f"{row}.png": png(row), f"{row}.txt": f"a photo, number {row}".encode()}
    refused(
        write_shard(tmp_path / "a.tar", members), "20 different texts, such as 'a photo, number 0': captions"
    )


@pytest.mark.parametrize("share", [0.3, 0.55, 0.75])
def test_a_shard_that_is_cut_off(tmp_path: Path, share: float) -> None:
    source = Path(write_shard(tmp_path / "a.tar", {f"{n}.png": os.urandom(3000) for n in range(9)}))
    source.write_bytes(source.read_bytes()[: int(share * source.stat().st_size)])
    refused(source, "a.tar is no tar file, or is damaged or cut off after [0-9].png")
    assert not list(tmp_path.glob(".*.index"))


def test_what_is_no_shard(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(b"no archive " * 200)
    refused(tmp_path / "a.tar", "a.tar is no tar file")
    damaged = bytearray(Path(write_shard(tmp_path / "b.tar", samples(0, 4))).read_bytes())
    damaged[2048:2058] = b"\xff" * 10  # the second header
    (tmp_path / "b.tar").write_bytes(damaged)
    refused(tmp_path / "b.tar", "b.tar is no tar file, or is damaged")
    with tarfile.open(tmp_path / "c.tar", "w:gz") as archive:
        archive.add(__file__, "a.png")
    refused(tmp_path / "c.tar", "c.tar is compressed")
    refused(tmp_path / "gone.tar", "no file matches .*gone.tar")
    refused(tmp_path / "gone-{00..03}.tar", "no file matches .*gone")
    write_shard(tmp_path / "gone-00.tar", samples(0, 2))
    refused(tmp_path / "gone-{00..03}.tar", "there is no .*gone-01.tar, .*gone-02.tar, .*gone-03.tar; name")
    refused(tmp_path / "gone-{3..1}.tar", "counts down")
    refused(tmp_path / "gone-{0..9999}{0..9999}.tar", "more than 1,000,000 shards")


# --- Commands ------------------------------------------------------------------------------------------


def test_a_command_is_run_from_the_command_line_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(2):
        write_shard(tmp_path / f"{number}.tar", samples(4 * number, 4))
    ran = tmp_path / "ran"
    source = f"pipe:echo x >> {ran}; cat {tmp_path}/{{0..1}}.tar"
    refused(source, "is done only where it stands on the command line")
    assert not ran.exists()
    monkeypatch.setattr(sys, "argv", ["vitral", "train", source])
    train = find(source).splits["train"]
    assert greys(train) == list(range(8))
    assert train.blocks is not None
    assert train.blocks.thrashes
    assert len(ran.read_text()) == 4  # once a shard
    assert greys(find(source).splits["train"]) == list(range(8))
    assert len(ran.read_text()) == 4


def test_a_shard_that_had_to_make_room_is_fetched_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VITRAL_STREAM_BYTES", str(2**20))
    for number in range(3):
        write_shard(tmp_path / f"{number}.tar", {**samples(number, 2), f"{number}x.bin": bytes(500_000)})
    source = f"pipe:cat {tmp_path}/{{0..2}}.tar"
    monkeypatch.setattr(sys, "argv", ["vitral", "train", source])
    train = find(source).splits["train"]
    kept = tmp_path / "cache" / "streams"
    assert greys(pickle.loads(pickle.dumps(train))) == [0, 1, 1, 2, 2, 3]
    assert sum(file.stat().st_size for file in kept.iterdir()) <= 2**20


def test_a_command_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = "pipe:cat /nowhere/at/all.tar"
    monkeypatch.setattr(sys, "argv", ["vitral", "train", source])
    refused(source, "ended with status 1: .*No such file")
    assert not [
        file for file in (tmp_path / "cache" / "streams").iterdir() if not file.name.startswith(".lock")
    ]
    monkeypatch.setattr(sys, "argv", ["vitral", "train", "pipe:cat {split}.tar"])
    refused("pipe:cat {split}.tar", "a command has no {split}")


def test_what_is_kept_is_bounded_and_the_oldest_goes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VITRAL_STREAM_BYTES", str(2**20))
    kept, fetched = FetchedFiles(tmp_path / "kept"), []

    def fetch(key: str) -> Path:
        def write(path: Path) -> None:
            fetched.append(key)
            path.write_bytes(key.encode() * 300_000)

        return kept.path(key, write)

    for key in "abcacd":
        assert fetch(key).read_bytes() == key.encode() * 300_000
        now = max((file.stat().st_mtime for file in (tmp_path / "kept").iterdir()), default=0)
        for file in (tmp_path / "kept").iterdir():  # clocks are coarse
            os.utime(file, (now - 1, file.stat().st_mtime - 1))
    assert "".join(fetched) == "abcd"
    assert fetch("b")
    assert "".join(fetched) == "abcdb"  # which was asked for the longest ago
