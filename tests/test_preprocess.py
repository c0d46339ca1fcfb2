"""`open_image` against hand-made pictures; `Preprocess` against torchvision's steps and hand-worked sizes."""

import gc
import io
import random
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from vitral.images.picture import open_image
from vitral.images.preprocess import Interpolation, Preprocess, Resize
from vitral.runtime.errors import ImageError

RED, BLUE, WHITE = (255, 0, 0), (0, 0, 255), (255, 255, 255)
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def solid(mode: str, colour: Any) -> Image.Image:
    return Image.new(mode, (5, 3), colour)


def noise(width: int, height: int) -> Image.Image:
    pixels = np.random.default_rng(width * 1000 + height).integers(0, 256, (height, width, 3))
    return Image.fromarray(pixels.astype(np.uint8))


def palette(colour: tuple[int, int, int]) -> Image.Image:
    image = solid("P", 0)
    image.putpalette(colour)
    return image


# --- open_image: what it can read ------------------------------------------------------------------

KINDS = {
    "RGB": (encoded(solid("RGB", (1, 2, 3))), (1, 2, 3)),
    "grey": (encoded(solid("L", 77)), (77, 77, 77)),
    "1-bit": (encoded(solid("1", 1)), WHITE),
    "palette": (encoded(palette((10, 20, 30))), (10, 20, 30)),
    "CMYK": (encoded(solid("CMYK", (0, 255, 255, 0)), "TIFF"), RED),
    "CMYK with black": (encoded(solid("CMYK", (0, 0, 0, 51)), "TIFF"), (204, 204, 204)),
    "16-bit grey PNG": (encoded(Image.fromarray(np.full((3, 5), 257 * 90, np.uint16))), (90, 90, 90)),
    "32-bit integers of 16-bit range": (Image.fromarray(np.full((3, 5), 257 * 90, np.int32)), (90, 90, 90)),
    "32-bit integers of 8-bit range": (Image.fromarray(np.full((3, 5), 90, np.int32)), (90, 90, 90)),
    "floats 0..1": (Image.fromarray(np.full((3, 5), 0.6, np.float32)), (153, 153, 153)),
    "floats 0..255": (Image.fromarray(np.full((3, 5), 153, np.float32)), (153, 153, 153)),
}
# 128/255 of the colour and 127/255 of white.
ON_WHITE = {
    "opaque RGBA": (encoded(solid("RGBA", (1, 2, 3, 255))), (1, 2, 3)),
    "half red": (encoded(solid("RGBA", (255, 0, 0, 128))), (255, 127, 127)),
    "clear black": (encoded(solid("RGBA", (0, 0, 0, 0))), WHITE),
    "opaque grey": (encoded(solid("LA", (100, 255))), (100, 100, 100)),
    "clear grey": (encoded(solid("LA", (100, 0))), WHITE),
    "palette with a clear entry": (encoded(palette((10, 20, 30)), transparency=0), WHITE),
    "palette with a half-clear entry": (
        encoded(palette((10, 20, 30)), transparency=b"\x80"),
        (132, 137, 142),
    ),
    "GIF with a clear entry": (encoded(palette((10, 20, 30)), "GIF", transparency=0), WHITE),
    "grey with a clear value": (encoded(solid("L", 77), transparency=77), WHITE),
    "RGB with a clear colour": (encoded(solid("RGB", (1, 2, 3)), transparency=(1, 2, 3)), WHITE),
}


def assert_solid(image: Image.Image, colour: tuple[int, int, int]) -> None:
    assert image.mode == "RGB"
    assert image.getcolors() == [(image.width * image.height, colour)]


@pytest.mark.parametrize(("source", "colour"), KINDS.values(), ids=KINDS.keys())
def test_every_kind_becomes_rgb_of_the_right_colour(
    source: bytes | Image.Image, colour: tuple[int, int, int]
) -> None:
    assert_solid(open_image(source), colour)


@pytest.mark.parametrize(("source", "colour"), ON_WHITE.values(), ids=ON_WHITE.keys())
def test_transparency_is_laid_on_white(source: bytes, colour: tuple[int, int, int]) -> None:
    assert_solid(open_image(source), colour)


def test_every_16_bit_grey_is_rounded_to_the_nearest_8_bit_grey() -> None:
    values = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    nearest = (values.astype(int) + 128) // 257
    image = open_image(encoded(Image.fromarray(values)))
    np.testing.assert_array_equal(np.asarray(image)[..., 0], nearest)


# How a camera stores the picture abc/def, by the number of its EXIF orientation: "row 0 of what is
# stored is the visual ..., column 0 is the visual ..." (EXIF 2.32, tag 0x0112).
STORED = {
    1: "abc/def",  # top, left
    2: "cba/fed",  # top, right
    3: "fed/cba",  # bottom, right
    4: "def/abc",  # bottom, left
    5: "ad/be/cf",  # left, top
    6: "cf/be/ad",  # right, top
    7: "fc/eb/da",  # right, bottom
    8: "da/eb/fc",  # left, bottom
}


def from_letters(text: str) -> Image.Image:
    return Image.fromarray(np.array([[ord(letter) for letter in row] for row in text.split("/")], np.uint8))


def to_letters(image: Image.Image) -> str:
    return "/".join("".join(map(chr, row)) for row in np.asarray(image)[..., 0])


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
@pytest.mark.parametrize(("orientation", "stored"), STORED.items())
def test_exif_rotation_is_applied_once(orientation: int, stored: str, kind: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    assert to_letters(open_image(encoded(from_letters(stored), kind, exif=exif))) == "abc/def"


@pytest.mark.parametrize("kind", ["GIF", "PNG", "TIFF", "WEBP"])
def test_an_animation_gives_its_first_frame(kind: str) -> None:
    options = {"lossless": True} if kind == "WEBP" else {}
    film = encoded(solid("RGB", RED), kind, save_all=True, append_images=[solid("RGB", BLUE)], **options)
    assert_solid(open_image(film), RED)


def test_an_animation_left_at_another_frame_gives_its_first() -> None:
    with Image.open(
        io.BytesIO(encoded(solid("RGB", RED), "GIF", save_all=True, append_images=[solid("RGB", BLUE)]))
    ) as film:
        film.seek(1)
        assert_solid(open_image(film), RED)


def test_floats_that_are_no_number_are_black() -> None:
    assert_solid(open_image(solid("F", float("nan"))), (0, 0, 0))


def test_path_text_bytes_picture_array_and_tensor_are_the_same_image(tmp_path: Path) -> None:
    picture, path = noise(7, 5), tmp_path / "noise.png"
    picture.save(path)
    pixels = np.asarray(picture)
    tensor_CHW = torch.from_numpy(pixels.copy()).permute(2, 0, 1)
    sources = [
        path,
        str(path),
        path.read_bytes(),
        picture,
        pixels,
        pixels / 255,
        tensor_CHW,
        tensor_CHW / 255,
    ]
    for source in sources:
        np.testing.assert_array_equal(np.asarray(open_image(source)), pixels)


@pytest.mark.parametrize("shape", [(5, 7), (5, 7, 1)])
def test_a_grey_array_keeps_its_axes(shape: tuple[int, ...]) -> None:
    grey = np.arange(35, dtype=np.uint8).reshape(shape)
    tensor = torch.from_numpy(grey)
    for source in (grey, tensor.permute(2, 0, 1) if tensor.ndim == 3 else tensor):
        np.testing.assert_array_equal(np.asarray(open_image(source))[..., 0], grey.reshape(5, 7))


# --- open_image: what it cannot read ---------------------------------------------------------------

PHOTO = encoded(noise(64, 48), "JPEG")
UNREADABLE = {
    "truncated JPEG": (PHOTO[: len(PHOTO) // 2], "truncated"),
    "truncated PNG": (encoded(noise(64, 48))[:2000], "truncated"),
    "zero bytes": (b"", "not an image"),
    "text": (b"I am a text file.", "not an image"),
}


@pytest.mark.parametrize(("content", "text"), UNREADABLE.values(), ids=UNREADABLE.keys())
def test_a_damaged_file_is_an_image_error(tmp_path: Path, content: bytes, text: str) -> None:
    path = tmp_path / "photo.jpg"
    path.write_bytes(content)
    for source in (path, content):
        with pytest.raises(ImageError, match=text):
            open_image(source)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match=r"there is no file .*gone\.jpg"):
        open_image(tmp_path / "gone.jpg")


ODD_ARRAYS = {
    "floats past 1": (np.full((2, 2, 3), 2.0), "floats from 2 to 2; give 0..1"),
    "not a number": (np.full((2, 2, 3), np.nan), "give 0..1"),
    "wide integers": (np.zeros((2, 2, 3), np.int64), r"int64 of shape \(2, 2, 3\); give bytes 0..255"),
    "five channels": (np.zeros((2, 2, 5), np.uint8), r"uint8 of shape \(2, 2, 5\)"),
    "a batch": (torch.zeros(2, 3, 4, 5, dtype=torch.uint8), r"shape \(2, 3, 4, 5\)"),
    "no pixels": (np.zeros((0, 4, 3), np.uint8), "no pixels"),
    "an empty picture": (Image.new("RGB", (0, 4)), "no pixels"),
    "too large": (encoded(Image.new("1", (20_000, 10_000))), "exceeds limit"),
}


@pytest.mark.parametrize(("source", "text"), ODD_ARRAYS.values(), ids=ODD_ARRAYS.keys())
def test_what_is_no_image_says_what_to_give(source: Any, text: str) -> None:
    with pytest.raises(ImageError, match=text):
        open_image(source)


# In "error" mode (see pyproject.toml) a warning of Pillow's would make these unreadable.
@pytest.mark.parametrize(
    "exif",
    [
        b"Exif\0\0II*\0\x08\0\0\0\x05\0\x12\x01",
        b"Exif\0\0II*\0\x08\0\0\0\x01\0\x0e\x01\x02\0\xff\xff\0\0\x06\0\0\0\0\0\0\0",
        b"Exif\0\0garbage",
    ],
    ids=["cut off", "tag larger than the file", "garbage"],
)
def test_damaged_exif_neither_warns_nor_hides_the_picture(exif: bytes) -> None:
    assert open_image(encoded(noise(64, 48), "JPEG", exif=exif)).size == (64, 48)


@pytest.mark.parametrize("name", ["film.gif", "damaged.jpg"])
def test_files_are_closed(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    film = encoded(solid("RGB", RED), "GIF", save_all=True, append_images=[solid("RGB", BLUE)])
    path.write_bytes(film if name == "film.gif" else PHOTO[:1500])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            open_image(path)
        except ImageError:
            assert name == "damaged.jpg"
        gc.collect()
    assert caught == []


# --- Preprocess ------------------------------------------------------------------------------------


def torchvision_steps(
    img_size: int, resize: int, interpolation: Interpolation = "bicubic"
) -> Callable[[Image.Image], torch.Tensor]:
    return v2.Compose(
        [
            v2.Resize(resize, v2.InterpolationMode(interpolation), antialias=True),
            v2.CenterCrop(img_size),
            v2.ToImage(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(MEAN, STD),
        ]
    )


def assert_same_pixels(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    # One step of 8 bits is 0.017 or more.
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


def odd_sizes(count: int) -> list[tuple[int, int]]:
    draw = random.Random(0)
    return [(draw.randint(1, 150), draw.randint(1, 150)) for _ in range(count)]


@pytest.mark.parametrize(
    ("img_size", "resize", "crop_fraction"),
    [
        (32, 32, 1.0),
        (28, 32, 0.875),
        (32, 35, 0.9),  # 35.6, which timm rounds down too
        (29, 31, 29 / 31),
        (7, 11, 7 / 11),
    ],
)
def test_equals_torchvision_on_images_of_every_shape(
    img_size: int, resize: int, crop_fraction: float
) -> None:
    ours = Preprocess((img_size, img_size), crop_fraction=crop_fraction, mean=MEAN, std=STD)
    theirs = torchvision_steps(img_size, resize)
    # Larger than, smaller than and of the target's own size, and one pixel across.
    for width, height in [*odd_sizes(80), (img_size, img_size), (resize, resize), (1, 150), (150, 1), (1, 1)]:
        image = noise(width, height)
        assert_same_pixels(ours(image), theirs(image))


@pytest.mark.parametrize("interpolation", ["nearest", "bilinear", "bicubic", "lanczos"])
def test_equals_torchvision_with_every_interpolation(interpolation: Interpolation) -> None:
    ours = Preprocess((28, 28), crop_fraction=0.875, interpolation=interpolation, mean=MEAN, std=STD)
    assert_same_pixels(ours(noise(83, 61)), torchvision_steps(28, 32, interpolation)(noise(83, 61)))


@pytest.mark.parametrize(("resize", "crop_fraction"), [(256, 0.875), (248, 0.9), (232, 224 / 232), (224, 1)])
def test_equals_torchvision_on_photographs(shared: Path, resize: int, crop_fraction: float) -> None:
    ours = Preprocess((224, 224), crop_fraction=crop_fraction, mean=MEAN, std=STD)
    theirs = torchvision_steps(224, resize)
    photos = sorted((shared / "data/photos").glob("*.jpg"))[::5]
    assert len(photos) >= 20
    for path in photos:
        with Image.open(path) as photo:
            assert_same_pixels(ours(path), theirs(photo.convert("RGB")))


# (width, height) of the image, (height, width) wanted, the share kept -> (width, height) resized to,
# and the (left, top) corner that is cut.
BY_HAND = {
    "tall from wide": ((100, 60), (30, 20), 1.0, (50, 30), (15, 0)),
    "wide from tall": ((60, 100), (20, 30), 1.0, (30, 50), (0, 15)),
    "wide from wide": ((100, 60), (20, 40), 1.0, (40, 24), (0, 2)),
    "half is kept": ((100, 60), (30, 20), 0.5, (100, 60), (40, 15)),
    "smaller than wanted": ((5, 4), (20, 30), 1.0, (30, 24), (0, 2)),
}


@pytest.mark.parametrize(
    ("size", "wanted", "share", "resized", "corner"), BY_HAND.values(), ids=BY_HAND.keys()
)
def test_rectangles_are_covered_and_cut_from_the_centre(
    size: tuple[int, int],
    wanted: tuple[int, int],
    share: float,
    resized: tuple[int, int],
    corner: tuple[int, int],
) -> None:
    image = noise(*size)
    left, top = corner
    expected = image.resize(resized, Image.Resampling.BICUBIC).crop(
        (left, top, left + wanted[1], top + wanted[0])
    )
    assert Preprocess(wanted, crop_fraction=share).fit(image).tobytes() == expected.tobytes()


def test_squash_ignores_the_aspect() -> None:
    expected = v2.Resize((17, 29), v2.InterpolationMode.BICUBIC, antialias=True)(noise(50, 90))
    assert Preprocess((17, 29), resize="squash").fit(noise(50, 90)).tobytes() == expected.tobytes()


def test_squash_cuts_the_centre_too() -> None:
    expected = noise(50, 90).resize((40, 40), Image.Resampling.BICUBIC).crop((5, 5, 35, 35))
    assert Preprocess((30, 30), resize="squash", crop_fraction=0.75).fit(noise(50, 90)) == expected


def test_longest_shows_the_whole_picture_on_the_mean_colour() -> None:
    preprocess = Preprocess((24, 24), resize="longest", mean=(0.2, 0.4, 0.6))
    whole = v2.Resize(None, v2.InterpolationMode.BICUBIC, max_size=24, antialias=True)(noise(80, 31))
    assert whole.size == (24, 9)
    pixels = np.asarray(preprocess.fit(noise(80, 31)))
    top = next(row for row in range(24) if (pixels[row] != (51, 102, 153)).any())
    assert top in (7, 8)  # half of the 15 rows that are left over
    np.testing.assert_array_equal(pixels[top : top + 9], np.asarray(whole))
    assert (np.delete(pixels, np.s_[top : top + 9], axis=0) == (51, 102, 153)).all()


def test_what_longest_adds_is_0_after_normalizing() -> None:
    tensor = Preprocess((24, 24), resize="longest", mean=(0.2, 0.4, 0.6))(noise(80, 8))
    torch.testing.assert_close(tensor[:, :5], torch.zeros(3, 5, 24))


@pytest.mark.parametrize("resize", ["shortest", "squash", "longest"])
@pytest.mark.parametrize("size", [(1, 1), (1, 400), (400, 1), (3, 1000), (2, 2)])
def test_one_colour_stays_that_colour_whatever_the_shape(size: tuple[int, int], resize: Resize) -> None:
    preprocess = Preprocess((16, 24), resize=resize, mean=(1, 0, 0))
    assert_solid(preprocess.fit(Image.new("RGB", size, RED)), RED)


def test_a_picture_too_narrow_to_enlarge_is_an_image_error() -> None:
    with pytest.raises(ImageError, match="too narrow to be resized, 100000x1 pixels"):
        Preprocess((224, 224))(Image.new("RGB", (100_000, 1)))


def test_normalizing_by_hand() -> None:
    preprocess = Preprocess((2, 2), mean=(0.5, 0.2, 0.0), std=(0.25, 0.5, 2.0))
    tensor = preprocess(Image.new("RGB", (2, 2), (51, 102, 255)))
    assert tensor.dtype == torch.float32
    assert tensor.shape == (3, 2, 2)
    torch.testing.assert_close(tensor[:, 0, 0], torch.tensor([(0.2 - 0.5) / 0.25, (0.4 - 0.2) / 0.5, 1 / 2]))


def test_calling_it_on_a_damaged_file_is_an_image_error() -> None:
    with pytest.raises(ImageError, match="truncated"):
        Preprocess((16, 16))(PHOTO[:1500])
