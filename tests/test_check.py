"""What `vitral check` finds is what was put into the data, as other libraries find it, and nothing else."""

import csv
import io
import json
import shlex
import shutil
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms, ImageFilter

from scripts.check_planted import judged_copies, judged_labels, with_copies, with_wrong_labels
from tests.test_cli import Vitral, assert_failed_in_one_line
from tests.test_cli import vitral as vitral  # the fixture
from tests.test_report import Page
from vitral.checks.check import Check, check
from vitral.checks.copies import Copies, find_copies
from vitral.checks.findings import Kind, Subject
from vitral.checks.labels import FOLDS, LabelSearch, _fitting_worst, _folds, label_kinds, search_labels
from vitral.checks.leaving import left_out
from vitral.checks.look import look_at
from vitral.checks.page import page_of
from vitral.data.image_data import ImageData, open_data
from vitral.data.split import Split
from vitral.data.subsets import thinned
from vitral.evaluation.analysis.matching import Matches
from vitral.evaluation.analysis.nearest import Cells
from vitral.images.stored import profile_name
from vitral.runtime.errors import VitralError


def picture(seed: int, side: int = 96) -> Image.Image:
    """Something with light, shade and detail, as photographs have them; different for every seed."""
    generator = np.random.default_rng(seed)
    image = Image.new("RGB", (side, side))
    for coarse in (4, 12, 40):
        noise = Image.fromarray(generator.integers(0, 256, (coarse, coarse, 3), dtype=np.uint8))
        image = Image.blend(image, noise.resize((side, side), Image.Resampling.BICUBIC), 0.5)
    return image.filter(ImageFilter.SHARPEN)


def written(folder: Path) -> Path:
    """Two splits of two classes of sound pictures."""
    for split, first, count in (("train", 0, 12), ("test", 100, 4)):
        for number in range(first, first + count):
            place = folder / split / ("ant", "bee")[number % 2]
            place.mkdir(parents=True, exist_ok=True)
            picture(number).save(place / f"{number}.jpg", quality=92)
    return folder


@pytest.fixture
def sound(tmp_path: Path) -> Path:
    return written(tmp_path / "data")


def names_of(found: Check, key: str) -> list[set[str]]:
    names = found.subject.split.names
    return [{names[row] for row in finding.rows} for finding in found.kind(key).findings]


def of_arrays(images: list[Any], labels: Any, classes: tuple[str, ...] = ("ant", "bee")) -> ImageData:
    split = Split(images, np.array(labels), [f"image {number}" for number in range(len(images))])
    return ImageData("arrays", classes, {"train": split})


# --- What is put in is found -----------------------------------------------------------------------


def test_nothing_is_found_in_sound_data(sound: Path) -> None:
    found = check(sound)
    assert [kind.key for kind in found.problems] == ["few"]  # six images to train on, of each class
    assert not found.left_out
    assert len(found.subject) == 16
    assert found.kind("label").missing


def test_files_that_are_broken_blank_tiny_or_long(sound: Path) -> None:
    ant = sound / "train" / "ant"
    (ant / "broken.jpg").write_bytes((ant / "0.jpg").read_bytes()[:700])
    (ant / "none.jpg").write_bytes(b"")
    Image.new("RGB", (90, 80), "navy").save(ant / "blank.png")
    picture(50, 9).save(ant / "tiny.png")
    picture(51).resize((400, 80)).save(ant / "long.png")
    found = check(sound)
    assert names_of(found, "broken") == [{"train/ant/broken.jpg"}, {"train/ant/none.jpg"}]
    assert names_of(found, "blank") == [{"train/ant/blank.png"}]
    assert names_of(found, "tiny") == [{"train/ant/tiny.png"}]
    assert names_of(found, "shape") == [{"train/ant/long.png"}]
    assert not names_of(found, "near")
    left = {found.subject.split.names[row] for row in found.left_out}
    assert left == {f"train/ant/{name}" for name in ("broken.jpg", "none.jpg", "blank.png")}
    assert found.advice == "A model may be better trained without 3 of them"
    most = replace(found, left_out=dict.fromkeys(range(12), "near"))
    assert (
        most.advice == "A model may be better trained without 12 of them: a large part, so look at them first"
    )


def test_how_files_are_stored(sound: Path) -> None:
    bee = sound / "train" / "bee"
    exif = Image.Exif()
    exif[0x0112] = 6
    picture(60).save(bee / "turned.jpg", exif=exif)
    picture(61).convert("CMYK").save(bee / "print.jpg")
    picture(62).save(bee / "name.jpg", "PNG")
    clear = picture(63).convert("RGBA")
    clear.putalpha(Image.linear_gradient("L").resize(clear.size))
    clear.save(bee / "clear.png")
    picture(64).convert("RGBA").save(bee / "opaque.png")
    picture(65).save(bee / "film.gif", save_all=True, append_images=[picture(66)])
    Image.fromarray(np.arange(96 * 96, dtype=np.uint16).reshape(96, 96)).save(bee / "deep.png")
    found = check(sound)
    for key, name in (
        ("turned", "turned.jpg"), ("cmyk", "print.jpg"), ("suffix", "name.jpg"), ("transparent", "clear.png"),
        ("frames", "film.gif"), ("deep", "deep.png"),
    ):  # fmt: skip
        assert names_of(found, f"stored:{key}") == [{f"train/bee/{name}"}], key
    assert not found.kind("stored:profile").findings
    assert [kind.key for kind in found.problems if kind.level == "wrong"] == []


def test_profiles_are_called_as_littlecms_calls_them(sound: Path) -> None:
    for kind in ("sRGB", "XYZ", "LAB"):
        profile: Any = ImageCms.ImageCmsProfile(ImageCms.createProfile(kind))
        assert profile_name(profile.tobytes()) == ImageCms.getProfileDescription(profile).strip()
    assert profile_name(b"") == profile_name(b"\0" * 300) == profile_name(b"\xff" * 300) == ""
    lab: Any = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB"))
    picture(70).save(sound / "train" / "ant" / "other.jpg", icc_profile=lab.tobytes())
    srgb: Any = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB"))
    picture(71).save(sound / "train" / "ant" / "usual.jpg", icc_profile=srgb.tobytes())
    assert names_of(check(sound), "stored:profile") == [{"train/ant/other.jpg"}]


def test_copies_within_splits_across_them_and_under_other_labels(sound: Path) -> None:
    train, test = sound / "train", sound / "test"
    shutil.copy(train / "ant" / "0.jpg", train / "ant" / "again.jpg")
    shutil.copy(train / "ant" / "2.jpg", train / "bee" / "other.jpg")
    shutil.copy(train / "ant" / "4.jpg", test / "ant" / "known.jpg")
    picture(1).transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(train / "bee" / "mirror.jpg", quality=60)
    picture(3).crop((3, 4, 92, 93)).save(test / "bee" / "crop.jpg", quality=70)
    picture(5).resize((64, 64)).save(train / "ant" / "small.png")
    found = check(sound)
    assert names_of(found, "same_file") == [{"train/ant/0.jpg", "train/ant/again.jpg"}]
    assert names_of(found, "same_file_labels") == [{"train/ant/2.jpg", "train/bee/other.jpg"}]
    assert names_of(found, "same_file_splits") == [{"train/ant/4.jpg", "test/ant/known.jpg"}]
    assert names_of(found, "near") == [{"train/bee/1.jpg", "train/bee/mirror.jpg"}]
    assert "mirrored" in found.kind("near").findings[0].says
    assert names_of(found, "near_splits") == [{"train/bee/3.jpg", "test/bee/crop.jpg"}]
    assert names_of(found, "near_labels") == [{"train/bee/5.jpg", "train/ant/small.png"}]
    left = {found.subject.split.names[row].split("/")[-1] for row in found.left_out}
    assert left == {"again.jpg", "2.jpg", "other.jpg", "4.jpg", "mirror.jpg", "3.jpg", "5.jpg", "small.png"}
    assert not any(found.subject.split_of(row) == "test" for row in found.left_out)


def test_several_copies_are_one_picture() -> None:
    images: list[Any] = [picture(number) for number in range(30)]
    images += [images[4].rotate(0), picture(4).resize((50, 50)), picture(4).resize((70, 70))]
    subject = Subject.of_data(of_arrays(images, [number % 2 for number in range(33)]))
    copies = find_copies(subject, look_at(subject.split, workers=0))
    assert copies.files == ((4, 30),)
    assert len({int(copies.groups[row]) for row in (4, 30, 31, 32)}) == 1
    assert len(np.unique(copies.groups)) == 30


def test_what_tells_the_class_without_looking(tmp_path: Path) -> None:
    for number in range(60):
        place = tmp_path / ("ant", "bee")[number % 2]
        place.mkdir(exist_ok=True)
        picture(number, 40).save(place / f"{number}.{('jpg', 'png')[number % 2]}")
    (shortcut,) = check(tmp_path).kind("shortcut").findings
    assert "the format alone tells the class of 100%" in shortcut.says


def test_several_labels_an_image(tmp_path: Path) -> None:
    images: list[Any] = [picture(number % 35) for number in range(36)]
    labels = np.random.default_rng(0).random((36, 3)) < 0.5
    labels[35] = ~labels[0]
    found = check(of_arrays(images, labels, ("a", "b", "c")))
    assert [finding.rows for finding in found.kind("same_file_labels").findings] == [(0, 35)]
    assert json.loads(json.dumps(found.to_dict()))["images"] == 36


# --- Nearest vectors -------------------------------------------------------------------------------


def test_cells_find_what_a_look_at_all_finds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of 3,000 vectors has a near twin among 3,000 others, in 64 dimensions as light and shade have."""
    generator = torch.Generator().manual_seed(0)
    unit = torch.nn.functional.normalize
    first_ND = unit(torch.randn(3000, 64, generator=generator), dim=1)
    second_ND = unit(first_ND + 0.05 * torch.randn(3000, 64, generator=generator), dim=1)
    alike, rows = Cells(second_ND).nearest(first_ND, 3)
    exact = (first_ND @ second_ND.T).topk(3)
    torch.testing.assert_close(alike, exact.values)
    assert torch.equal(rows[:, 0], exact.indices[:, 0])
    monkeypatch.setattr("vitral.evaluation.analysis.nearest._CELL", 100)
    rows = Cells(second_ND).nearest(first_ND, 1)[1]
    assert (rows[:, 0] == torch.arange(3000)).float().mean() > 0.97
    rows = Cells(second_ND).nearest(second_ND, 2, but_itself=True)[1]
    assert not (rows == torch.arange(3000)[:, None]).any()


# --- Labels ----------------------------------------------------------------------------------------


def searched(
    count: int = 600, classes: int = 4, share: float = 0.08
) -> tuple[Subject, torch.Tensor, np.ndarray]:
    """Features of classes that lie apart, and which labels were changed."""
    generator = np.random.default_rng(1)
    truth = np.arange(count) % classes
    vectors = torch.from_numpy(generator.normal(size=(count, 8)) + 3.5 * np.eye(8)[truth]).float()
    changed = generator.random(count) < share
    labels = np.where(changed, (truth + 1) % classes, truth)
    names = tuple(f"class {place}" for place in range(classes))
    return Subject.of_data(of_arrays([None] * count, labels, names)), vectors, changed


def test_probes_answer_as_scikit_learns_and_flag_what_cleanlab_flags(monkeypatch: pytest.MonkeyPatch) -> None:
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import PredefinedSplit, cross_val_predict
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    monkeypatch.setattr("vitral.checks.labels._TRIMMED", 0.0)
    subject, vectors, changed = searched()
    groups = np.arange(len(changed))
    found = search_labels(vectors, np.arange(len(changed)), subject, groups)
    assert isinstance(found, LabelSearch)
    folds = _folds(subject.split.labels, groups, 0)
    closest = np.inf
    for penalty in 10.0 ** np.arange(-3, 2.0):
        model = make_pipeline(StandardScaler(), LogisticRegression(C=1 / (penalty * 480), max_iter=1000))
        cv = PredefinedSplit(folds)
        theirs = cross_val_predict(model, vectors.numpy(), found.labels, cv=cv, method="predict_proba")
        closest = min(closest, np.abs(theirs - found.probabilities).max())
    assert closest < 5e-3
    named = {doubt.position for doubt in found.doubts.doubts}
    truth = set(np.flatnonzero(changed).tolist())
    assert len(named & truth) > 0.7 * len(truth)
    assert len(named & truth) > 0.9 * len(named)
    pytest.importorskip("cleanlab", reason="cleanlab, of the extra test, is not installed")
    from cleanlab.filter import find_label_issues

    flags = find_label_issues(
        found.labels, found.probabilities.astype(float), filter_by="confident_learning", n_jobs=1
    )
    assert named == set(np.flatnonzero(flags).tolist())


def test_folds_keep_pictures_whole_and_deal_classes_evenly() -> None:
    generator = np.random.default_rng(0)
    labels, groups = generator.integers(0, 7, 500), generator.integers(0, 300, 500)
    folds = _folds(labels, groups, 3)
    for group in range(300):
        assert len(set(folds[groups == group])) <= 1
    alone = _folds(labels, np.arange(500), 3)
    counts = np.array([np.bincount(alone[labels == place], minlength=FOLDS) for place in range(7)])
    assert (np.ptp(counts, 1) <= 1).all()


def test_what_fits_worst_teaches_nothing_in_the_second_round() -> None:
    generator = np.random.default_rng(0)
    probabilities, labels = generator.dirichlet(np.ones(3), 200), np.repeat([0, 1, 2], [100, 85, 15])
    worst = _fitting_worst(probabilities, labels)
    assert [int(worst[labels == place].sum()) for place in range(3)] == [5, 4, 0]
    own = probabilities[np.arange(200), labels]
    assert own[worst & (labels == 0)].max() < own[~worst & (labels == 0)].min()


def test_labels_are_left_out_only_where_the_probes_are_good() -> None:
    for share, trusted in ((0.05, True), (0.4, False)):
        subject, vectors, _ = searched(share=share)
        found = search_labels(vectors, np.arange(600), subject, np.arange(600))
        assert isinstance(found, LabelSearch)
        assert found.trusted == trusted
        near = Matches(*(np.empty(0, kind) for kind in (int, int, float, bool)))
        kinds = (
            Kind("broken", "", "wrong", ""),
            Kind("blank", "", "wrong", ""),
            *label_kinds(found, "a model"),
        )
        left = left_out(subject, kinds, Copies((), near, 0.25, 0, np.arange(600)), found)
        assert len(left) == (len(found.doubts.doubts) if trusted else 0)


def test_rare_classes_take_no_part_in_the_search() -> None:
    subject, vectors, _ = searched(count=203, classes=2)
    labels = subject.split.labels.copy()
    labels[:3] = 2
    data = of_arrays([None] * 203, labels, ("a", "b", "rare"))
    found = search_labels(vectors, np.arange(203), Subject.of_data(data), np.arange(203))
    assert isinstance(found, LabelSearch)
    assert found.classes == ("a", "b")
    assert len(found.rows) == 200
    few = search_labels(vectors[:6], np.arange(6), Subject.of_data(data), np.arange(203))
    assert few == f"too few classes have {FOLDS} images or more"


def test_labels_of_several_classes_are_searched_one_at_a_time() -> None:
    generator = np.random.default_rng(2)
    truth = generator.random((400, 3)) < 0.4
    vectors = torch.from_numpy(generator.normal(size=(400, 6)) * 0.5 + 2 * truth @ np.eye(3, 6)).float()
    labels = truth.copy()
    labels[7, 1] = ~labels[7, 1]
    subject = Subject.of_data(of_arrays([None] * 400, labels, ("a", "b", "c")))
    found = search_labels(vectors, np.arange(400), subject, np.arange(400))
    assert isinstance(found, LabelSearch)
    first = found.doubts.doubts[0]
    assert first.position == 7
    assert {first.given, first.suggested} == {"b", "not b"}
    assert found.accuracy > 0.95


# --- Real pictures ---------------------------------------------------------------------------------


def test_planted_copies_among_real_pictures(shared: Path) -> None:
    pytest.importorskip("pyarrow")
    data = open_data(str(shared / "data" / "cifar10" / "{split}.parquet"), val_fraction=0)
    data = ImageData(data.source, data.classes, {"test": thinned(data.split("test"), 400)})
    data = ImageData(data.source, data.classes, {"train": data.split("test")})
    data, originals = with_copies(data, 120, np.random.default_rng(0))
    judged = judged_copies(check(data, workers=0), originals)
    assert judged["recall of all"] >= 0.95
    assert judged["precision"] >= 0.99
    assert judged["recall"].keys() == {"quality 50", "crop 90 %", "mirror", "brightness 10 %"}
    assert judged["pairs without copies"] <= 4


def test_the_script_counts_wrong_labels() -> None:
    subject, vectors, _ = searched(share=0.0)
    data, changed = with_wrong_labels(subject.data, 0.05, np.random.default_rng(0))
    assert len(changed) == 30
    again = Subject.of_data(data)
    found = search_labels(vectors, np.arange(600), again, np.arange(600))
    assert isinstance(found, LabelSearch)
    result = Check(again, (), "", np.arange(600), found, {}, None, "", {})
    judged = judged_labels(result, changed)
    assert judged["AUPRC"] > 0.85
    assert judged["estimated share"] == pytest.approx(0.05, abs=0.03)


# --- The command -----------------------------------------------------------------------------------


def test_the_command_tells_writes_and_ends_as_asked(sound: Path, vitral: Vitral, tmp_path: Path) -> None:
    shutil.copy(sound / "train" / "ant" / "0.jpg", sound / "test" / "ant" / "<b>&.jpg")
    page, table = tmp_path / "check.html", tmp_path / "clean.csv"
    result = vitral("check", sound, "--out", page, "--write", table, "--workers", "0")
    assert result.status == 0
    assert "the same file in several splits" in result.out
    assert "--write" not in result.out  # it was asked for already
    with table.open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 16
    assert {row["split"] for row in rows} == {"train", "test"}
    assert all((tmp_path / row["image"]).is_file() for row in rows)
    assert all(f"/{row['label']}/" in row["image"] for row in rows)
    assert "data/train/ant/0.jpg" not in {row["image"] for row in rows}
    again = check(table, workers=0)
    assert {split: len(images) for split, images in again.subject.data.splits.items()} == {
        "train": 11,
        "test": 5,
    }
    assert {kind.key for kind in again.problems} == {"few"}
    trained_as_told(vitral, result.err, tmp_path / "run")
    shown = Page.of(page.read_text())
    assert "&lt;b&gt;&amp;.jpg" in page.read_text()
    assert "<b>&" not in page.read_text()
    assert all((image["src"] or "").startswith("data:") for image in shown.all("img"))
    assert "test/ant/<b>&.jpg" in " ".join(shown.text)
    strict = vitral("check", sound, "--strict", "--json", "--workers", "0")
    assert strict.status == 1
    told = json.loads(strict.out)
    (leak,) = next(kind for kind in told["kinds"] if kind["kind"] == "same_file_splits")["findings"]
    assert [image["split"] for image in leak["images"]] == ["train", "test"]
    assert told["left_out"] == {"train/ant/0.jpg": "the same picture is in test"}


def test_a_model_is_asked_for_labels_and_more_copies(sound: Path, vitral: Vitral, tmp_path: Path) -> None:
    from vitral.checkpoints.folder import Checkpoint, save_checkpoint
    from vitral.images.preprocess import Preprocess
    from vitral.model.vit import VisionTransformer

    model = VisionTransformer(16, 8, embed_dim=16, num_layers=1, num_heads=2, num_classes=2, dropout=0.0)
    save_checkpoint(tmp_path / "model", Checkpoint(model, Preprocess((16, 16)), ("ant", "bee")))
    result = vitral("check", sound, tmp_path / "model", "--json", "--workers", "0")
    assert result.status == 0, result.err
    told = json.loads(result.out)
    assert told["model"]
    assert set(told["seconds"]) == {"looking", "features", "comparing", "probing", "all"}
    assert "missing" not in next(kind for kind in told["kinds"] if kind["kind"] == "label")


def test_what_cannot_be_checked_is_said_in_one_line(vitral: Vitral, tmp_path: Path) -> None:
    assert_failed_in_one_line(vitral("check", tmp_path), "holds no images")
    wrong = vitral("check", "digits", "--write", tmp_path / "clean.csv")
    assert_failed_in_one_line(wrong, "write the images themselves: --write clean.parquet")
    assert not (tmp_path / "clean.csv").exists()
    assert vitral("check", "digits", "--out", tmp_path / "page.txt").status == 2


# --- Training without what was found ---------------------------------------------------------------


def trained_as_told(vitral: Vitral, check_err: str, run: Path) -> str:
    """Runs the command that a check prints, for two steps; gives what it told."""
    [command] = [line.split("try: ")[1] for line in check_err.splitlines() if "try: vitral train" in line]
    words = [str(run) if word == "RUN" else word for word in shlex.split(command)[1:]]
    result = vitral(
        *words, "steps=2", "batch_size=4", "img_size=16", "architecture.patch_size=8", "workers=0"
    )
    assert result.status == 0, result.err
    return result.err


def as_parquet(data: ImageData, folder: Path) -> str:
    """A file a split, whose classes have no names and are called 0 and 1."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    for name, split in data.splits.items():
        contents = [Path(str(split.images[row])).read_bytes() for row in range(len(split))]
        pq.write_table(
            pa.table({"image": contents, "label": split.labels.tolist()}), folder / f"{name}.parquet"
        )
    return str(folder / "{split}.parquet")


def as_shards(data: ImageData, folder: Path) -> str:
    for name, split in data.splits.items():
        with tarfile.open(folder / f"{name}.tar", "w") as shard:
            for row in range(len(split)):
                shard.add(str(split.images[row]), f"{row:03}.jpg")
                label = data.classes[split.labels[row]].encode()
                member = tarfile.TarInfo(f"{row:03}.cls")
                member.size = len(label)
                shard.addfile(member, io.BytesIO(label))
    return str(folder / "{split}.tar")


@pytest.mark.parametrize("stored", [as_parquet, as_shards])
def test_a_command_trains_without_what_was_found_in_files_of_many_images(
    stored: Callable[[ImageData, Path], str], sound: Path, vitral: Vitral, tmp_path: Path
) -> None:
    """Of 17 images one is a copy of a test image, and one of one colour: 15 are left, of the same bytes."""
    pytest.importorskip("pyarrow")
    shutil.copy(sound / "train" / "ant" / "0.jpg", sound / "test" / "ant" / "copy.jpg")
    Image.new("RGB", (90, 80), "navy").save(sound / "train" / "bee" / "1.jpg")
    images = open_data(sound, val_fraction=0)
    source, cleaned = stored(images, tmp_path), tmp_path / "cleaned" / "clean.parquet"
    cleaned.parent.mkdir()
    result = vitral("check", source, "--write", cleaned, "--workers", "0")
    assert result.status == 0, result.err
    again = open_data(cleaned, val_fraction=0)
    assert again.classes == open_data(source, val_fraction=0).classes
    for name, left in (("train", {"ant/0.jpg", "bee/1.jpg"}), ("test", set())):
        before, after = images.split(name), again.split(name)
        kept = [row for row, of in enumerate(before.names) if not any(of.endswith(each) for each in left)]
        assert after.labels.tolist() == before.labels[kept].tolist()
        contents = [Path(str(before.images[row])).read_bytes() for row in kept]
        assert [after.images[row] for row in range(len(after))] == contents
    assert not check(cleaned, workers=0).left_out
    told = trained_as_told(vitral, result.err, tmp_path / "run")
    assert "15 images in 2 classes" in told


def test_images_in_memory_are_written_as_they_are_shown(tmp_path: Path) -> None:
    """Of the digits, which must not be mirrored, as the command says to training."""
    datasets = pytest.importorskip("pyarrow.parquet")
    digits = thinned(open_data("digits", val_fraction=0).split("train"), 60)
    data = ImageData("digits", tuple("0123456789"), {"train": digits}, mirror_safe=False)
    found = check(data, write=tmp_path / "clean.parquet", workers=0)
    assert found.written is not None
    assert found.written.settings == ("flip=false", "rand_augment=0")
    rows = datasets.read_table(tmp_path / "clean.parquet").to_pylist()
    kept = [row for row in range(60) if row not in found.left_out]
    assert [row["label"] for row in rows] == digits.labels[kept].tolist()
    for row, place in zip(rows, kept, strict=True):
        shown: Any = digits.images[place]
        stored = Image.open(io.BytesIO(row["image"]["bytes"]))
        assert np.array_equal(np.asarray(stored)[..., 0], np.asarray(shown))


def test_what_is_written_has_several_labels_and_the_users_groups(tmp_path: Path) -> None:
    """A patient's pictures stay together, and with them those of another whose picture is the same."""
    pytest.importorskip("pyarrow")
    images: list[Any] = [picture(number) for number in range(12)] + [picture(3)]
    labels = np.arange(39).reshape(13, 3) % 2 == 0
    patients = np.array([7, 7, 8, 8, 9, 9, 10, 10, 11, 11, 12, 12, 10])  # the copy of 8's is 10's
    split = Split(images, labels, [f"image {number}" for number in range(13)], patients)
    data = ImageData("arrays", ("a", "b", "c"), {"train": split})
    found = check(data, write=tmp_path / "clean.parquet", workers=0)
    assert found.written is not None
    again = open_data(tmp_path / "clean.parquet", val_fraction=0).split("train")
    kept = [row for row in range(13) if row not in found.left_out]
    assert again.labels.tolist() == labels[kept].tolist()
    assert again.groups is not None
    numbers = dict(zip(kept, again.groups.tolist(), strict=True))
    assert numbers[2] == numbers[6] == numbers[7]
    assert len(set(numbers.values())) == 5


def test_nothing_is_written_where_a_class_would_be_lost_but_what_was_found_is_told(
    vitral: Vitral, tmp_path: Path
) -> None:
    sound = written(tmp_path / "data")
    for number, file in enumerate(sorted((sound / "test" / "bee").iterdir())):
        Image.new("RGB", (90, 80), ("navy", "teal")[number]).save(file)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for name in ("clean.parquet", "clean.csv"):
        result = vitral("check", sound, "--write", tmp_path / name, "--workers", "0")
        assert result.status == 1
        assert "of one colour" in result.out
        assert "is not written: without what was found test has no images of bee" in result.err
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_the_data_itself_is_not_written_over(sound: Path, vitral: Vitral, tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    pattern = as_parquet(open_data(sound, val_fraction=0), tmp_path)
    before = (tmp_path / "train.parquet").read_bytes()
    for source, file in ((pattern, "train.parquet"), (str(tmp_path / "*.parquet"), "new.parquet")):
        result = vitral("check", source, "--write", tmp_path / file, "--workers", "0")
        assert_failed_in_one_line(result, "name a file that is not")
    assert (tmp_path / "train.parquet").read_bytes() == before


def test_the_page_is_of_the_data_alone(sound: Path) -> None:
    first, second = (page_of(check(sound, workers=0)) for _ in range(2))
    assert first == second
    assert "Data check" in first
    assert "http" not in first.replace("http-equiv", "").replace("http://www.w3.org", "")


def test_no_folder_of_a_model_is_an_error_in_words(sound: Path) -> None:
    with pytest.raises(VitralError, match="nowhere"):
        check(sound, "nowhere")


def test_images_in_memory_and_bytes() -> None:
    content = io.BytesIO()
    picture(0).save(content, "PNG")
    images: list[Any] = [content.getvalue(), *(picture(number) for number in range(1, 8)), b"nothing"]
    found = check(of_arrays(images, [0, 1] * 4 + [0]))
    assert [finding.rows for finding in found.kind("broken").findings] == [(8,)]
