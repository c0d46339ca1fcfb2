"""JPEGs decoded no more finely than they are looked at: where, how far from the whole, and from memory."""

import io
import json
from dataclasses import fields, replace
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from tests.test_cli import Vitral
from tests.test_cli import vitral as vitral  # the fixture
from vitral.bench.data.workload import photographs
from vitral.bench.rounds import Settings
from vitral.bench.run import run
from vitral.checkpoints.folder import Checkpoint, load_checkpoint, save_checkpoint
from vitral.data import kept as module
from vitral.data.batches import ImageKey, ImageLoading, collate
from vitral.data.image_data import open_data
from vitral.data.kept import Kept, Pictures, keep
from vitral.data.loader import Loader
from vitral.data.split import Split
from vitral.data.workers import Loading
from vitral.evaluation.diagnosis.decoding import decoding_costs
from vitral.images.augment import alteration, training_transform
from vitral.images.augmentation import Augmentation
from vitral.images.picture import open_image, undecoded
from vitral.images.preprocess import Decoding, Preprocess
from vitral.inference.classifier import Classifier
from vitral.model.vit import VisionTransformer
from vitral.recipes.recipe import Recipe
from vitral.runtime.devices import Placement
from vitral.runtime.errors import ImageError, VitralError
from vitral.runtime.memory import available_bytes
from vitral.training.bounds import Bound, Means, TellsBound, bound_of
from vitral.training.events import Evaluated, RunBegins
from vitral.training.listeners import Message
from vitral.training.loop import train

PREPROCESS = Preprocess((32, 32), crop_fraction=0.875, interpolation="bicubic")
RESIZED = Augmentation("resized", flip=True)


def photo(width: int, height: int, seed: int = 0, **options: Any) -> bytes:
    """Smooth colours with some noise, as a JPEG."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8))
    image = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC)).astype(int)
    pixels = (image + rng.normal(0, 6, image.shape)).clip(0, 255).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=90, **options)
    return file.getvalue()


def turned(content: bytes, orientation: int) -> bytes:
    image, file = Image.open(io.BytesIO(content)), io.BytesIO()
    exif = image.getexif()
    exif[0x0112] = orientation
    image.save(file, "JPEG", quality=90, exif=exif)
    return file.getvalue()


# --- How finely ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("most", "scale"), [(0.5, 1), (1.9, 1), (2, 2), (7.9, 4), (8, 8), (99, 8)])
def test_a_jpeg_is_divided_by_no_more_than_is_asked(most: float, scale: int) -> None:
    with undecoded(photo(211, 97)) as picture:
        assert picture.size == (97, 211)
        assert picture.scale(most) == scale
        shape = picture.pixels(scale).shape
    assert shape == (-(-97 // scale), -(-211 // scale), 3)


def test_what_cannot_be_divided_is_decoded_whole() -> None:
    file = io.BytesIO()
    open_image(photo(211, 97)).save(file, "PNG")
    with undecoded(file.getvalue()) as picture:
        assert picture.scale(99) == 1
        assert picture.pixels().shape == (97, 211, 3)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_size_is_that_of_the_upright_picture(orientation: int) -> None:
    source = turned(photo(96, 64), orientation)
    whole = open_image(source)
    with undecoded(source) as picture:
        assert picture.size == (whole.height, whole.width)
        assert picture.pixels(2).shape == (whole.height // 2, whole.width // 2, 3)


@pytest.mark.parametrize(
    ("decoding", "side", "scale"),
    [("full", 600, 1), ("fast", 127, 1), ("fast", 128, 2), ("fastest", 63, 1), ("fastest", 64, 2)],
)
def test_so_many_pixels_are_left_for_each(decoding: Decoding, side: int, scale: int) -> None:
    asked = []

    preprocess = Preprocess((32, 32), decoding=decoding)
    with undecoded(photo(side, side + 8)) as picture:
        for name in ("_image", "_pixels"):  # as a picture, or at once as an array
            decode = getattr(picture, name)
            setattr(picture, name, lambda divided, decode=decode: asked.append(divided) or decode(divided))
        assert preprocess.fit(picture).size == (32, 32)
    assert {*asked} == {scale}


def test_a_damaged_jpeg_is_damaged_at_each_scale() -> None:
    content = photo(400, 300)
    for scale in (1, 2, 8):
        with pytest.raises(ImageError), undecoded(content[: len(content) // 2]) as picture:
            picture.pixels(scale)


# --- How far from the whole ------------------------------------------------------------------------


def differences(preprocess: Preprocess, decoding: Decoding, source: Any) -> np.ndarray:
    coarse = replace(preprocess, decoding=decoding).pixels(source).astype(int)
    return np.abs(coarse - preprocess.pixels(source).astype(int))


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_undivided_the_quick_resize_is_a_level_off_at_most(interpolation: Any) -> None:
    preprocess = replace(PREPROCESS, interpolation=interpolation)
    found = differences(preprocess, "fast", photo(101, 75))
    assert found.max() <= 1
    assert (found > 0).mean() < 0.02


def test_divided_it_is_close_and_closer_where_more_is_left() -> None:
    fast, fastest = (
        np.mean([differences(PREPROCESS, decoding, photo(640, 480, seed)) for seed in range(4)])
        for decoding in ("fast", "fastest")
    )
    assert 0 < fast < fastest < 2  # of 255 grey levels


def test_a_model_of_grey_images_sees_no_colour() -> None:
    preprocess = replace(PREPROCESS.for_channels(1), decoding="fastest")
    pixels_HWC = preprocess.pixels(photo(640, 480))
    assert (pixels_HWC == pixels_HWC[..., :1]).all()


@pytest.mark.parametrize("flip", [False, True])
def test_decoded_in_full_a_crop_is_torchvisions(flip: bool) -> None:
    steps: list[Any] = [
        v2.RandomResizedCrop((32, 32), scale=(0.35, 1.0), interpolation=v2.InterpolationMode.BICUBIC)
    ]
    theirs = v2.Compose([*steps, *([v2.RandomHorizontalFlip()] if flip else [])])
    ours = alteration(PREPROCESS, replace(RESIZED, flip=flip))
    for seed in range(20):
        source = photo(97, 75, seed)
        torch.manual_seed(seed)
        with undecoded(source) as picture:
            pixels = ours(picture)
        torch.manual_seed(seed)
        assert np.array_equal(pixels, np.asarray(theirs(open_image(source))))


def test_a_coarse_crop_is_of_the_same_place() -> None:
    for seed in range(8):
        images = []
        for decoding in get_args(Decoding):
            torch.manual_seed(seed)
            images.append(
                training_transform(replace(PREPROCESS, decoding=decoding), RESIZED)(photo(640, 480))
            )
        for coarse in images[1:]:
            levels = (coarse - images[0]).abs().mean() * 255 / 2
            assert levels < 4  # a row or column further it would be 8


# --- What is kept ----------------------------------------------------------------------------------


def test_what_was_put_comes_back_and_only_once() -> None:
    kept, rng = Kept(3, 1000), np.random.default_rng(0)
    first, second = (rng.integers(0, 256, (4, side, 3), dtype=np.uint8) for side in (5, 6))
    assert kept.get(1) is None
    kept.put(1, first)
    kept.put(1, second)
    kept.put(1, second, scale=2)
    assert np.array_equal(kept.get(1), first)  # type: ignore[arg-type]
    assert np.array_equal(kept.get(1, 2), second)  # type: ignore[arg-type]
    assert kept.nbytes == 60 + 72
    assert kept.get(0) is None


def test_there_is_no_more_than_the_room() -> None:
    kept = Kept(3, 100)
    for row in range(3):
        kept.put(row, np.full((4, 5, 3), row, np.uint8))
    assert [kept.get(row) is not None for row in range(3)] == [True, False, False]


def test_nothing_is_kept_where_not_all_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "available_bytes", lambda: 1000)
    assert keep(10, 301) is None
    assert keep(10, 299) is not None


@pytest.mark.parametrize("decoding", get_args(Decoding))
def test_a_kept_picture_is_the_decoded_one_and_its_file_is_left_alone(decoding: Decoding) -> None:
    sources: list[Any] = [photo(300, 200), turned(photo(96, 64), 6), open_image(photo(90, 80))]
    kept, preprocess = Kept(3, 10**6), replace(PREPROCESS, decoding=decoding)
    wanted = [preprocess.pixels(source) for source in sources]
    for images in (sources, [b"gone"] * 3):
        pictures = Pictures(images, kept)
        for row, pixels_HWC in enumerate(wanted):
            with pictures.opened(row) as picture:
                assert np.array_equal(np.asarray(preprocess.fit(picture)), pixels_HWC)


def split_of(count: int) -> Split:
    files: list[Any] = [photo(150 + 7 * row, 120, row) for row in range(count)]
    return Split(files, np.arange(count), [f"image {row}" for row in range(count)])


@pytest.mark.parametrize("decoding", get_args(Decoding))
def test_kept_or_not_and_by_any_processes_batches_have_the_same_bits(decoding: Decoding) -> None:
    split, preprocess = split_of(9), replace(PREPROCESS, decoding=decoding)
    found = []
    for workers in (0, 2):
        for again in (False, True):
            loader = Loader(split, preprocess, Loading(workers), again=again)
            trained = list(islice(loader.training_batches(RESIZED, batch_size=4, seed=3), 9))
            judged = [*loader.evaluation_batches(4), *loader.evaluation_batches(4)]
            found.append(torch.cat([batch.images for batch in (*trained, *judged)]))
            assert again == (loader._kept is not None) == (loader._fitted is not None)
    assert all(torch.equal(other, found[0]) for other in found[1:])


def test_worker_processes_fill_one_memory() -> None:
    split, kept = split_of(9), Kept(9, 10**7)

    def whole(picture: Any) -> np.ndarray:
        return picture.pixels()[:100, :100]

    keys = [[ImageKey(0, row)] for row in range(9)]
    batches = list(
        Loading(2).batches(ImageLoading(split, whole, None, Pictures(split.images, kept)), keys, collate)
    )
    assert len(batches) == 9
    there = [row for row in range(9) if kept.get(row) is not None]
    assert there  # one that finds another at work leaves its picture to a later pass
    for row in there:
        assert np.array_equal(kept.get(row), np.asarray(open_image(split.images[row])))  # type: ignore[arg-type]


# --- A setting -------------------------------------------------------------------------------------


def test_a_file_of_a_model_names_it_where_it_is_not_full(tmp_path: Path) -> None:
    model = VisionTransformer(32, 16, embed_dim=16, num_layers=1, num_heads=2, num_classes=2)
    assert "decoding" not in PREPROCESS.record()
    fast = replace(PREPROCESS, decoding="fast")
    save_checkpoint(tmp_path / "model", Checkpoint(model, fast, ("x", "y")))
    assert load_checkpoint(tmp_path / "model").preprocess == fast


# --- What it changes, said -------------------------------------------------------------------------


def classifier() -> Classifier:
    torch.manual_seed(0)
    model = VisionTransformer(32, 16, embed_dim=16, num_layers=1, num_heads=2, num_classes=3)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return Classifier(model.eval(), PREPROCESS, ("x", "y", "z"), Placement.choose("cpu", "float32"))


def test_doctor_measures_what_each_way_of_decoding_changes() -> None:
    files: list[Any] = [photo(640, 480, seed) for seed in range(3)]
    split = Split([*files, b"no image"], np.zeros(4, dtype=np.int64), list("abcd"))
    model = classifier()
    for cost in decoding_costs(model, split):
        coarse = replace(PREPROCESS, decoding=cost.decoding)
        levels = np.stack([differences(PREPROCESS, cost.decoding, file) for file in files])
        assert (cost.images, cost.most_levels) == (3, levels.max())
        assert cost.levels == pytest.approx(levels.mean())
        with torch.inference_mode():
            theirs, ours = (
                model.model(torch.stack([each(file) for file in files])) for each in (coarse, PREPROCESS)
            )
        assert cost.logits == pytest.approx(float((theirs - ours).abs().mean()), rel=1e-3)
        assert cost.same == int((theirs.argmax(1) == ours.argmax(1)).sum())


def test_of_images_that_all_ways_decode_alike_there_is_nothing_to_say() -> None:
    file = io.BytesIO()
    open_image(photo(32, 32)).save(file, "PNG")
    images: list[Any] = [file.getvalue()]
    preprocess = replace(PREPROCESS, crop_fraction=1.0)
    assert (
        decoding_costs(replace(classifier(), preprocess=preprocess), Split(images, np.zeros(1, int), ["a"]))
        == ()
    )
    assert decoding_costs(classifier(), Split([b"no image"], np.zeros(1, int), ["a"])) == ()


def test_eval_decodes_as_it_is_asked(vitral: Vitral, tmp_path: Path) -> None:
    for name in ("x", "y", "z"):
        (tmp_path / "data" / name).mkdir(parents=True)
        for seed in range(4):
            (tmp_path / "data" / name / f"{seed}.jpg").write_bytes(photo(640, 480, seed))
    model = classifier()
    save_checkpoint(tmp_path / "model", Checkpoint(model.model, PREPROCESS, model.labels))
    words = ["eval", str(tmp_path / "model"), str(tmp_path / "data"), "--split", "all", "--json"]
    losses = []
    for more in ([], ["--decoding", "full"], ["--decoding", "fastest"]):
        losses.append(json.loads(vitral(*words, *more).out)["loss"])
    assert losses[0] == losses[1] != losses[2]


# --- What bounds a run -----------------------------------------------------------------------------


def bound(seconds: dict[str, float], **means: Any) -> Bound:
    found = bound_of(seconds, replace(Means(0, 2, "fast", 0.0, "cpu", None), **means))
    assert found is not None
    return found


def test_a_run_that_hardly_waits_is_bound_by_its_steps() -> None:
    found = bound({"waiting": 10, "stepping": 90, "decoding": 300})
    assert (found.part, found.share) == ("stepping", 0.9)


@pytest.mark.parametrize(
    ("means", "advice"),
    [
        ({}, "workers=2"),
        ({"cores": 8, "workers": 4}, "workers=7"),
        ({"workers": 2}, "decoding=fastest"),
        ({"workers": 2, "decoding": "full"}, "decoding=fast "),
        ({"workers": 2, "decoding": "fastest"}, "store the images smaller"),
    ],
)
def test_one_that_waits_for_decoding_is_told_what_to_set(means: dict[str, Any], advice: str) -> None:
    found = bound({"waiting": 60, "stepping": 40, "decoding": 50, "altering": 10}, **means)
    assert found.part == "decoding"
    assert advice in str(found)
    assert "60%" in str(found)


def test_augmentation_and_the_way_to_the_device_are_told_apart() -> None:
    altering = bound(
        {"waiting": 60, "stepping": 40, "decoding": 10, "altering": 50}, workers=2, rand_augment=9.0
    )
    assert altering.part == "altering"
    assert "rand_augment=0" in altering.advice
    assert bound({"waiting": 60, "stepping": 40, "decoding": 50, "moving": 40}).part == "moving"


def test_of_a_few_seconds_nothing_is_said() -> None:
    assert bound_of({"waiting": 10, "stepping": 5}, Means(0, 2, "fast", 0.0, "cpu", None)) is None


def test_two_parts_that_are_as_slow_do_not_take_turns() -> None:
    told: list[str] = []
    seconds = {"waiting": 30.0, "stepping": 10.0, "decoding": 15.0}
    run: Any = SimpleNamespace(
        clock=SimpleNamespace(seconds=seconds),
        recipe=SimpleNamespace(settings=dict),
        tell=SimpleNamespace(message=told.append),
    )
    tells = TellsBound()
    tells(RunBegins(run))
    for altering in (14.0, 16.0, 14.0, 16.0):
        seconds["altering"] = altering
        tells(Evaluated(*[None] * len(fields(Evaluated))))  # pyrefly: ignore[bad-argument-type]
    assert [text.split(" bounds")[0] for text in told] == ["decoding of images", "augmentation"]


def test_a_run_says_it_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vitral.training.bounds._LEAST_SECONDS", 0.0)
    monkeypatch.setattr("vitral.training.bounds._WORTH_A_WORD", 0.0)  # waiting always counts
    for name in ("x", "y"):
        (tmp_path / "data" / name).mkdir(parents=True)
        for seed in range(6):
            (tmp_path / "data" / name / f"{seed}.jpg").write_bytes(photo(320, 240, seed))
    model = VisionTransformer(32, 16, embed_dim=16, num_layers=1, num_heads=2, num_classes=2)
    save_checkpoint(tmp_path / "base", Checkpoint(model, PREPROCESS, ("x", "y")))
    told: list[str] = []

    def listen(event: Any) -> None:
        if isinstance(event, Message):
            told.append(event.text)

    given = {"model": str(tmp_path / "base"), "batch_size": 4, "steps": 6, "crop": "resized", "workers": 0}
    recipe = Recipe(**given, device="cpu", probe_head=False)
    train(open_data(tmp_path / "data"), tmp_path / "run", recipe, listeners=[listen])
    said = [text for text in told if "bounds the speed" in text]
    assert len(said) == len({text.split(" bounds")[0] for text in said}) >= 1
    assert any(text.startswith("decoding of images") for text in said)


# --- Beside the other libraries ---------------------------------------------------------------------


def test_the_benchmark_of_loaders_compares_equal_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vitral.bench.data.measure._ALONE_BATCHES", 2)
    for number in range(6):
        (tmp_path / f"{number}.jpg").write_bytes(photo(160, 120, number))
    words = [str(tmp_path), "img_size=32", "batch_size=3"]
    settings = Settings(Placement.choose("cpu"), rounds=1, peers=("torchvision",))
    report = run("data", words, settings)
    rows = {(row.task, row.contender, row.configuration): row for row in report.rows}
    for library, configuration in (("torchvision", "default"), ("vitral", "kept"), ("vitral", "fast")):
        assert rows["training crops", library, configuration].images == 6
        assert rows["evaluation", library, configuration].levels == pytest.approx(0, abs=0.05)
    assert rows["evaluation", "vitral", "fastest"].levels > 0.1  # type: ignore[operator]
    assert rows["training crops", "torchvision", "default"].folder_ratio == 1
    assert any(row.task.startswith("loader alone") for row in report.rows)


def test_the_benchmark_makes_photographs_and_refuses_what_it_does_not_know() -> None:
    with photographs(["images=2", "photo_size=[48,64]"]) as photos:
        assert [open_image(file).size for file in photos.files] == [(64, 48)] * 2
    assert not photos.folder.exists()
    for words in (["side=3"], ["img_size=0"], ["/nowhere"], ["photo_size=[0,8]"]):
        with pytest.raises(VitralError), photographs(words):
            pass


# --- Memory ------------------------------------------------------------------------------------------


def test_a_containers_limit_is_heeded(tmp_path: Path) -> None:
    group = tmp_path / "cgroup" / "a" / "b"
    group.mkdir(parents=True)
    own = tmp_path / "own"
    own.write_text("0::/a/b\n")
    (group / "memory.max").write_text("max\n")
    (group.parent / "memory.max").write_text("1000000\n")
    (group.parent / "memory.current").write_text("700000\n")
    (group.parent / "memory.stat").write_text("anon 5\ninactive_file 100000\n")
    assert available_bytes(tmp_path / "cgroup", own) == 400_000
    assert available_bytes(tmp_path / "cgroup", tmp_path / "none") > 1_000_000
