"""JPEGs decoded no more finely than they are looked at: where, how far from the whole, and from memory."""

import io
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from vitral.data import kept as module
from vitral.data.kept import Kept, Pictures, keep
from vitral.data.loader import Loader
from vitral.data.split import Split
from vitral.data.workers import Loading
from vitral.images.augment import alteration, training_transform
from vitral.images.augmentation import Augmentation
from vitral.images.picture import open_image, undecoded
from vitral.images.preprocess import Decoding, Preprocess
from vitral.runtime.errors import ImageError

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
        decode = picture._image
        picture._image = lambda divided: asked.append(divided) or decode(divided)  # type: ignore[method-assign]
        assert preprocess.fit(picture).size == (32, 32)
    assert asked == [scale]


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
    loaded = partial(module.Pictures, split.images, kept)
    from vitral.data.batches import ImageKey, ImageLoading, collate

    def whole(picture: Any) -> np.ndarray:
        return picture.pixels()[:100, :100]

    keys = [[ImageKey(0, row)] for row in range(9)]
    batches = list(Loading(2).batches(ImageLoading(split, whole, None, loaded()), keys, collate))
    assert len(batches) == 9
    there = [row for row in range(9) if kept.get(row) is not None]
    assert there  # one that finds another at work leaves its picture to a later pass
    for row in there:
        assert np.array_equal(kept.get(row), np.asarray(open_image(split.images[row])))  # type: ignore[arg-type]


# --- A setting -------------------------------------------------------------------------------------


def test_a_file_of_a_model_names_it_where_it_is_not_full(tmp_path: Path) -> None:
    from vitral.checkpoints.folder import Checkpoint, load_checkpoint, save_checkpoint
    from vitral.model.vit import VisionTransformer

    model = VisionTransformer(32, 16, embed_dim=16, num_layers=1, num_heads=2, num_classes=2)
    assert "decoding" not in PREPROCESS.record()
    fast = replace(PREPROCESS, decoding="fast")
    save_checkpoint(tmp_path / "model", Checkpoint(model, fast, ("x", "y")))
    assert load_checkpoint(tmp_path / "model").preprocess == fast
