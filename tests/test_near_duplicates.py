"""Copies of real photographs are found among others, and different pictures are not taken for copies."""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance

from vitral.data.image_data import open_data
from vitral.data.split import Split
from vitral.evaluation.analysis import near_duplicates as module
from vitral.evaluation.analysis.alignment import align, likeness, zoomed
from vitral.evaluation.analysis.near_duplicates import COPIED, NEAR, near_duplicates

PHOTOS = 40


def encoded(image: Image.Image, quality: int = 90, kind: str = "JPEG") -> bytes:
    content = io.BytesIO()
    image.save(content, kind, quality=quality)
    return content.getvalue()


def without(image: Image.Image, left: float, top: float, right: float, bottom: float) -> Image.Image:
    """The picture without these shares of its sides."""
    width, height = image.size
    box = left * width, top * height, (1 - right) * width, (1 - bottom) * height
    return image.crop(tuple(map(round, box)))  # type: ignore[arg-type]  # pyrefly: ignore


def mirrored(image: Image.Image) -> Image.Image:
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)


COPIES: dict[str, tuple[Callable[[Image.Image], bytes], int]] = {  # and how many of 40 are found at least
    "stored anew": (lambda image: encoded(image, 40), 40),
    "as WebP": (lambda image: encoded(image, 60, "WEBP"), 40),
    "small": (lambda image: encoded(image.resize((80, 80 * image.height // image.width))), 40),
    "squashed": (lambda image: encoded(image.resize((224, 224))), 40),
    "mirrored": (lambda image: encoded(mirrored(image)), 40),
    "brighter": (lambda image: encoded(ImageEnhance.Brightness(image).enhance(1.3)), 39),
    "grey": (lambda image: encoded(image.convert("L")), 40),
    "cropped by 3 %": (lambda image: encoded(without(image, 0.03, 0.03, 0.03, 0.03)), 38),
    "cropped by 5 %": (lambda image: encoded(without(image, 0.05, 0.05, 0.05, 0.05)), 38),
    "a tenth is lacking": (lambda image: encoded(without(image, 0.1, 0, 0, 0)), 38),
    "mirrored and cropped": (lambda image: encoded(without(mirrored(image), 0.06, 0.03, 0.02, 0.06)), 36),
}


@pytest.fixture(scope="module")
def photos(shared: Path) -> Split:
    """Forty photographs, kept small so that each is decoded fast."""
    files = sorted((shared / "data" / "photos").glob("*.jpg"))[: 2 * PHOTOS : 2]
    images = [Image.open(file).convert("RGB") for file in files]
    for image in images:
        image.thumbnail((320, 320))
    return split_of([encoded(image, 95) for image in images], [file.name for file in files])


def split_of(images: list[Any], names: list[str] | None = None) -> Split:
    return Split(images, np.zeros(len(images), dtype=int), names or [f"{n}" for n in range(len(images))])


@pytest.mark.parametrize("kind", COPIES)
def test_a_copy_is_found_among_other_pictures(kind: str, photos: Split) -> None:
    copy, least = COPIES[kind]
    pictures = [Image.open(io.BytesIO(content)) for content in photos.images]  # type: ignore[arg-type]  # pyrefly: ignore
    copies = split_of([copy(picture) for picture in pictures])
    found = near_duplicates(copies, photos, workers=0)
    assert all(pair.row == pair.other_row and not pair.within for pair in found.pairs)
    assert len(found.pairs) == found.leaked >= least
    assert (found.held_out, found.train, found.left_out) == (PHOTOS, PHOTOS, 0)
    assert all(pair.mirrored == ("mirrored" in kind) for pair in found.pairs)
    assert all(0 <= pair.distance <= found.limit == NEAR for pair in found.pairs if "cropped" not in kind)


def test_a_photograph_and_its_copy_within_the_held_out_images(photos: Split) -> None:
    images = [*photos.images, encoded(mirrored(Image.open(io.BytesIO(photos.images[7]))))]  # type: ignore[arg-type]  # pyrefly: ignore
    labels = np.arange(len(images))
    found = near_duplicates(Split(images, labels, [*photos.names, "copy"]), None, workers=0)
    (pair,) = found.pairs
    assert (pair.row, pair.other_row, pair.within, pair.mirrored) == (7, PHOTOS, True, True)
    assert (pair.name, pair.other_name, pair.same_label) == (photos.names[7], "copy", False)
    assert (found.leaked, found.train) == (0, 0)


def test_different_pictures_are_rarely_taken_for_copies(shared: Path) -> None:
    """Of 2,000 test images of CIFAR-10 every pair that is found shows one photograph (looked at)."""
    pytest.importorskip("pyarrow")
    data = open_data(str(shared / "data" / "cifar10" / "{split}.parquet"), val_fraction=0)
    rows = np.sort(np.random.default_rng(0).choice(10_000, 2000, replace=False))
    found = near_duplicates(data.split("test").take(rows), None, workers=0)
    assert len(found.pairs) <= 7
    assert all(pair.same_label for pair in found.pairs)


def test_pictures_that_are_alike_by_nature_are_no_copies() -> None:
    data = open_data("digits")
    val, train = data.split("val").take(np.arange(200)), data.split("train").take(np.arange(700))
    found = near_duplicates(val, train, workers=0)
    assert found.limit == COPIED
    assert found.leaked <= 2
    assert found.akin > 100
    assert near_duplicates(val, val, workers=0).leaked == len(val)


def test_damaged_images_and_those_beyond_the_limit_are_left_out(
    photos: Split, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = [*photos.images[:9], b"no picture"]  # type: ignore[index]  # pyrefly: ignore
    seen: list[tuple[int, int]] = []
    monkeypatch.setattr(module, "MOST_TRAIN", 6)
    told = lambda done, total: seen.append((done, total))  # noqa: E731
    found = near_duplicates(split_of(images), photos, workers=0, on_images=told)
    assert (found.held_out, found.train, found.left_out) == (9, 6, 1 + PHOTOS - 6)
    assert seen[-1] == (16, 16)
    nothing = near_duplicates(split_of([b"no picture"]), split_of([b"no picture"]), workers=0)
    assert (nothing.pairs, nothing.held_out, nothing.left_out) == ((), 0, 2)


def test_a_known_crop_is_undone() -> None:
    """A picture of waves is cut out by 0.9 and shifted; the placement found says so."""
    line = torch.linspace(-1, 1, 32)
    x, y = torch.meshgrid(line, line, indexing="xy")
    picture = torch.sin(5 * x + 2 * y) + torch.cos(3 * y - 4 * x * y) + torch.sin(15 * x + 4 * y)
    cut = zoomed(picture[None], 0.9)
    placement = align(cut, picture[None], torch.tensor([[1.0, 1.0, 0.0, 0.0]]), 10)
    torch.testing.assert_close(placement, torch.tensor([[0.9, 0.9, 0.0, 0.0]]), atol=0.01, rtol=0)
    assert likeness(cut, picture[None], placement).item() > 0.98
    assert likeness(cut, picture[None], torch.tensor([[1.0, 1.0, 0.0, 0.0]])).item() < 0.9


def test_what_has_no_detail_is_like_nothing() -> None:
    flat = torch.full((1, 32, 32), 7.0)
    assert likeness(flat, flat, torch.tensor([[1.0, 1.0, 0.0, 0.0]])).item() == 0
